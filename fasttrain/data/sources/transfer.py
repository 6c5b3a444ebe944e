"""One file from a server that may be slow, cut off, wrong or hostile: resumed, bounded and verified."""

import hashlib
import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.data.sources.releases import RemoteFile
from fasttrain.errors import one_line
from fasttrain.system.progress import show_bytes

ANSWER_SECONDS = 5  # from the name's resolution to the end of all redirects: a dead server must cost little
SILENCE_SECONDS = 10  # between two chunks
SLOW_SECONDS, SLOW_BYTES_PER_S = 10, 200_000  # CIFAR-10's original server, throttled, sends 55 to 85 kB/s
CHUNK_BYTES = 1 << 18
SCHEMES = ("http://", "https://", "file://")


class SourceError(Exception):
    """The reason why one source failed; never a fault of the local disk."""


class SlowError(SourceError):
    """A source delivers less than was asked of it; what it gave is kept. rate: bytes per second."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"slow, {rate / 1e3:.0f} kB/s")
        self.rate = rate


class Pace:
    """Counts what one source delivers, over all its files and connections, and tells when it is too slow.

    least: bytes per second; below that for SLOW_SECONDS is too slow.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._since, self._received = time.monotonic(), 0

    def count(self, received: int) -> None:
        """Add the bytes of one chunk. Raises SlowError."""
        self._received += received
        seconds = time.monotonic() - self._since
        if seconds >= SLOW_SECONDS:
            rate = self._received / seconds
            if rate < self._least:
                raise SlowError(rate)
            self._since, self._received = time.monotonic(), 0


def transfer(url: str, file: RemoteFile, part: Path, pace: Pace, title: str) -> None:
    """Complete `part` from a URL (http, https, file) and verify it.

    Bytes that `part` holds already are not asked for again, if the server can do that. A `part` with wrong
    content is removed; one that is too short is kept, to resume from.
    Raises SourceError, of that SlowError if the source falls behind the pace.
    """
    while True:
        fresh = not part.exists() or part.stat().st_size == 0
        _complete(url, file, part, pace, title)
        if part.stat().st_size == file.bytes and digest(part, file) == file.digest:
            return
        part.unlink()
        # The first bytes may have come from another place: only blame this one for a file it sent in full.
        if fresh:
            raise SourceError(
                f"the content is not the release's (size or {file.digest.split(':')[0]} differs)"
            )


def digest(path: Path, file: RemoteFile) -> str:
    """Return a file's checksum in the form of file.digest."""
    algorithm = file.digest.split(":")[0]
    found = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            found.update(chunk)
    return f"{algorithm}:{found.hexdigest()}"


def _complete(url: str, file: RemoteFile, part: Path, pace: Pace, title: str) -> None:
    """Append to `part` until it has the file's size, with new connections as long as each adds bytes."""
    size = part.stat().st_size if part.exists() else 0
    if size >= file.bytes:
        return
    with show_bytes(title, file.bytes, size) as show:
        while size < file.bytes:
            before = size
            reason = _receive(url, file, part, size, pace, show)
            size = part.stat().st_size
            if size <= before:
                raise SourceError(reason or f"it ends after {size} of {file.bytes} bytes")


def _receive(
    url: str, file: RemoteFile, part: Path, offset: int, pace: Pace, show: Callable[[int], None]
) -> str:
    """Download over one connection; returns why it broke, or "". Raises SourceError if it cannot start."""
    with _open(url, offset) as response:
        # How many of the coming bytes are in `part` already: all of those, if the server cannot resume.
        already = offset - _check_answer(response, file, offset)
        with part.open("ab") as output:
            while output.tell() <= file.bytes:
                try:
                    chunk = response.read1(CHUNK_BYTES)  # not read: that waits until the chunk is full
                except (OSError, http.client.HTTPException) as error:
                    return _reason(error)
                if not chunk:
                    break
                output.write(chunk[already:])
                already = max(0, already - len(chunk))
                show(output.tell())
                pace.count(len(chunk))
    return ""


def _check_answer(response: Any, file: RemoteFile, offset: int) -> int:
    """Return where in the file the answer begins. Raises SourceError if it is not about this file.

    Only a 206 resumes where we stopped: a server without ranges, or a local file, starts from the beginning.
    """
    if response.headers.get_content_type() == "text/html":
        raise SourceError("a web page, not the file")
    if getattr(response, "status", None) == 206:
        place = response.headers.get("Content-Range", "")
        if place != f"bytes {offset}-{file.bytes - 1}/{file.bytes}":
            raise SourceError(f"answers with another part of the file: {place[:80]!r}")
        return offset
    size = response.headers.get("Content-Length")
    if size is not None and size.strip() != str(file.bytes):
        raise SourceError(f"its file has {size[:20]} bytes; the release's has {file.bytes}")
    return 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; urllib ends a loop after ten."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise SourceError(f"redirects to {newurl[:80]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, offset: int) -> Any:
    if not url.startswith(SCHEMES):
        raise SourceError("not a http, https or file URL")
    headers = {"User-Agent": "fasttrain"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    opener = urllib.request.build_opener(_Redirects)
    try:
        request = urllib.request.Request(url, headers=headers)
        return _within(ANSWER_SECONDS, lambda: opener.open(request, timeout=SILENCE_SECONDS))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # the server's file is shorter than our part: one of them is wrong
            return _open(url, 0)
        raise SourceError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a malformed URL
        raise SourceError(_reason(error)) from error


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns, or raise what it raises; SourceError if that takes longer.

    A timeout of the socket would not do: it counts anew for each address of a name, and each line received.
    """
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise SourceError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return cause if isinstance(cause, str) else one_line(cause)
