"""`fasttrain watch`: a run's page in the browser, which follows the run while it trains."""

import functools
import io
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from fasttrain.errors import UserError
from fasttrain.report.html import progress_page
from fasttrain.report.run import load_unfinished
from fasttrain.system.run_folder import RECIPE_FILE, RESULT_FILE

REFRESH_SECONDS = 5
"""How often the browser asks for the page of a run that has not finished."""


def watch(folder: Path, *, port: int = 8000, log: Callable[[str], object] = print) -> None:
    """Serve a run's page to this machine's browsers until a signal; only reads the folder.

    While the run trains, the page shows its epochs so far; then it is the run's report.html.
    folder: a run's; latest is the newest in runs/, finished or not. port: 0 takes any that is free.
    Raises UserError if there is no such run, or if the port cannot be used.
    """
    folder = _newest_run() if folder == Path("latest") and not folder.exists() else folder
    load_unfinished(folder)  # refuse what is not a run
    try:
        server = ThreadingHTTPServer(
            ("127.0.0.1", port), functools.partial(_PageOfRun, directory=str(folder))
        )
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: cannot be used ({error}); choose another one") from error
    with server:
        log(f"{folder} -> http://127.0.0.1:{server.server_port}; Ctrl-C stops this")
        server.serve_forever()


def _newest_run() -> Path:
    runs = [recipe.parent for recipe in Path("runs").glob(f"*/{RECIPE_FILE}")]
    if not runs:
        raise UserError("latest: no run in runs/; name a run's folder, or train one")
    return max(runs)  # the names begin with the time


class _PageOfRun(SimpleHTTPRequestHandler):
    """Answers / with the run's page, and the names of the folder's files, to which report.html links."""

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        folder = Path(self.directory)
        if self.path != "/":
            return super().send_head()
        if (folder / RESULT_FILE).exists() and (folder / "report.html").exists():
            self.path = "/report.html"
            return super().send_head()
        try:
            status, page = 200, progress_page(load_unfinished(folder), REFRESH_SECONDS)
        except UserError as error:
            status, page = 503, str(error)
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"text/{'html' if status == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def log_message(self, *_: object) -> None:
        """Stay silent: the browser asks every few seconds."""
