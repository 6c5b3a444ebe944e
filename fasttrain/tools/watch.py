"""`fasttrain watch`: a run's page in the browser, which follows the run while it trains."""

import functools
import io
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from fasttrain.errors import UserError
from fasttrain.report.html import progress_page
from fasttrain.report.run import load_unfinished
from fasttrain.system.files import is_held
from fasttrain.system.program import typed
from fasttrain.system.run_folder import RECIPE_FILE, RESULT_FILE, run_folder

REFRESH_SECONDS = 5
"""How often the browser asks for the page of a run that has not finished."""

_print_now = functools.partial(print, flush=True)


def watch(folder: Path, *, port: int = 8000, log: Callable[[str], object] = _print_now) -> None:
    """Serve a run's page to this machine's browsers until a signal; only reads the folder.

    While the run trains, the page shows its epochs so far; then it is the run's report.html.
    folder: a run's; latest is the newest in runs/, finished or not. port: 0 takes any that is free.
    Raises UserError if there is no such run, or if the port cannot be used.
    """
    folder = run_folder(folder, RECIPE_FILE)
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


@functools.lru_cache(maxsize=1)
def _drawn(folder: Path, epochs_written: float, is_training: bool | None) -> str:
    """Return the page, drawn only once for each epoch: the CPU may be the one that trains."""
    return progress_page(load_unfinished(folder), REFRESH_SECONDS)


def _written(path: Path) -> float:
    """Return when a file was last written; 0 if there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


class _PageOfRun(SimpleHTTPRequestHandler):
    """Answers / with the run's page, and the names of the folder's files, to which report.html links."""

    _drawing = threading.Lock()  # matplotlib draws in one thread at a time

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # a website that has pointed its own name here
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        folder = Path(self.directory)
        result, report = _written(folder / RESULT_FILE), _written(folder / "report.html")
        if self.path == "/" and 0 < result <= report:
            self.path = "/report.html"
        if self.path != "/":
            return super().send_head()
        try:
            if result:
                command = typed("report", str(folder))
                raise UserError(f"The run has finished, and has no page (yet); to write it: {command}")
            with self._drawing:
                page = _drawn(folder, _written(folder / "metrics.jsonl"), is_held(folder))
            kind = "html"
        except UserError as error:
            page, kind = str(error), "plain"
        body = page.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Refresh", str(REFRESH_SECONDS))
        self.end_headers()
        return io.BytesIO(body)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")  # another run may be watched at this address next
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, *_: object) -> None:
        """Stay silent: the browser asks every few seconds."""
