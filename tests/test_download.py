"""Downloads from servers on this machine: good ones, broken ones, slow ones and hostile ones."""

import dataclasses
import hashlib
import importlib.util
import io
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from fasttrain.data.load_dataset import load_dataset
from fasttrain.data.run_images import RunImages, find_dataset
from fasttrain.data.sources import archives, cifar, download, releases, transfer
from fasttrain.data.sources.releases import Archive, Release, RemoteFile, Source
from fasttrain.errors import UserError
from fasttrain.tools.show_data import show_dataset
from tests.helpers import parquet, pickle_of, records, small_files, small_release, tar_gz, write_release

FOLDER = cifar.CIFAR10.folder


class Mirror(ThreadingHTTPServer):
    """Serves one file. cuts: after how many bytes the first connections break. rate: bytes per second."""

    daemon_threads = True

    def __init__(
        self,
        content: bytes = b"",
        *,
        name: str = "cifar-10-binary.tar.gz",
        ranges: bool = True,
        cuts: tuple[int, ...] = (),
        rate: float = float("inf"),
        answer: Callable[["_Handler"], None] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.ranges, self.cuts, self.rate = content, ranges, list(cuts), rate
        self.answer = answer
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client hung up, as it should


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror = self.server
        asked = self.headers.get("Range")
        mirror.asked.append(asked)
        if mirror.answer:
            mirror.answer(self)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and mirror.ranges else 0
        if start >= len(mirror.content):
            self.send_error(416)
            return
        body = mirror.content[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(mirror.content) - 1}/{len(mirror.content)}"
        self.begin(206 if start else 200, **headers)
        body = body[: mirror.cuts.pop(0)] if mirror.cuts else body
        size = len(body) if mirror.rate == float("inf") else max(1, int(mirror.rate / 50))
        for offset in range(0, len(body), size):
            self.wfile.write(body[offset : offset + size])
            time.sleep(size / mirror.rate)

    def begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


Serve = Callable[..., Mirror]


@pytest.fixture
def serve() -> Iterator[Serve]:
    mirrors: list[Mirror] = []

    def start(content: bytes = b"", **how: object) -> Mirror:
        mirror = Mirror(content, **how)  # type: ignore[arg-type]
        mirrors.append(mirror)
        threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return mirror

    yield start
    for mirror in mirrors:
        mirror.shutdown()
        mirror.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a server that does not answer for half a second, or sends less than 60 kB/s."""
    monkeypatch.setattr(transfer, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(transfer, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(transfer, "SLOW_SECONDS", 0.4)
    monkeypatch.setattr(download, "SLOW_BYTES_PER_S", 60_000)


def members() -> dict[str, bytes]:
    """The binary release's layout in small."""
    return {
        **{f"{FOLDER}/{name}": content for name, content in small_files().items()},
        f"{FOLDER}/{cifar.CIFAR10.classes_file}": b"anything",
    }


def pickles() -> dict[str, bytes]:
    """The Python release's layout in small."""
    return {
        f"cifar-10-batches-py/{name.removesuffix('.bin')}": pickle_of(content)
        for name, content in small_files().items()
    }


def remote(name: str, content: bytes) -> RemoteFile:
    return RemoteFile(name, len(content), f"md5:{hashlib.md5(content).hexdigest()}")


def publish(monkeypatch: pytest.MonkeyPatch, release: Release) -> Release:
    """Make this CIFAR-10 for this test."""
    for module in (cifar, download):
        monkeypatch.setattr(module, "CIFAR10", release)
    monkeypatch.setitem(cifar.RELEASES, "cifar10", release)
    return release


def pack(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive of `files`, which becomes the archive of CIFAR-10's binary release for this test."""
    archive = tar_gz(files)
    file = remote("cifar-10-binary.tar.gz", archive)
    publish(monkeypatch, small_release(binary=Archive("binary", FOLDER, (file,))))
    return archive


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    return pack(members(), monkeypatch)


@pytest.fixture
def python_archive(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = tar_gz(pickles())
    python = Archive("python", "cifar-10-batches-py", (remote("cifar-10-python.tar.gz", content),))
    publish(monkeypatch, dataclasses.replace(cifar.CIFAR10, python=python))
    return content


def assert_complete(root: Path) -> None:
    folder = root / cifar.CIFAR10.folder
    assert list(root.iterdir()) == [folder]  # neither the archive nor a temporary folder
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.pop(cifar.CIFAR10.classes_file).split() == [name.encode() for name in cifar.CIFAR10.classes]
    assert found == small_files()


def part_of(root: Path) -> Path:
    return root / "cifar-10-binary.tar.gz.part"


def test_download(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    mirror = serve(archive)
    root = tmp_path / "new" / "data"
    download.download(root, [mirror.url])
    assert_complete(root)
    download.download(root, [mirror.url])
    assert mirror.asked == [None]  # the second call found the files


def test_a_cut_connection_is_resumed(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    mirror = serve(archive, cuts=(9000, 7000))
    download.download(tmp_path, [mirror.url])
    assert_complete(tmp_path)
    assert mirror.asked == [None, "bytes=9000-", "bytes=16000-"]


def test_the_next_run_goes_on_where_one_stopped(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    mirror = serve(archive, cuts=(9000, 0))
    with pytest.raises(download.DownloadError, match=f"9000 of {len(archive)} bytes"):
        download.download(tmp_path, [mirror.url])
    assert part_of(tmp_path).read_bytes() == archive[:9000]
    download.download(tmp_path, [mirror.url])
    assert_complete(tmp_path)
    assert mirror.asked[-1] == "bytes=9000-"


def test_a_server_without_ranges_sends_all_of_it_again(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    part_of(tmp_path).write_bytes(archive[:5000])
    mirror = serve(archive, ranges=False)
    download.download(tmp_path, [mirror.url])
    assert_complete(tmp_path)
    assert mirror.asked == ["bytes=5000-"]


def test_a_server_without_ranges_does_not_cost_what_is_there(
    tmp_path: Path, archive: bytes, serve: Serve
) -> None:
    part_of(tmp_path).write_bytes(archive[:5000])
    with pytest.raises(download.DownloadError, match=f"it ends after 5000 of {len(archive)} bytes"):
        download.download(tmp_path, [serve(archive, ranges=False, cuts=(3000,)).url])
    assert part_of(tmp_path).read_bytes() == archive[:5000]


def test_a_stale_part_is_dropped(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    for stale in (b"?" * 5000, b"?" * len(archive), b"?" * (len(archive) + 1)):
        root = tmp_path / str(len(stale))
        root.mkdir()
        part_of(root).write_bytes(stale)
        download.download(root, [serve(archive).url])
        assert_complete(root)


def test_a_range_beyond_the_end_starts_anew(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    # 416: the mirror's file is shorter than our part. The part is good, the mirror is not, the next one is.
    part_of(tmp_path).write_bytes(archive[:-10])
    short = serve(archive[:-20])
    good = serve(archive)
    download.download(tmp_path, [short.url, good.url])
    assert_complete(tmp_path)
    assert short.asked == [f"bytes={len(archive) - 10}-", None]


@pytest.mark.parametrize("change", [lambda x: x[:-1] + b"?", lambda x: x + b"?", lambda x: x * 100])
def test_wrong_bytes_lead_to_the_next_mirror(
    tmp_path: Path, archive: bytes, serve: Serve, change: Callable[[bytes], bytes]
) -> None:
    wrong = serve(change(archive))
    advice = (
        f"(not the release's|the release's has).*Put cifar-10-binary.* into {tmp_path} yourself.*synthetic"
    )
    with pytest.raises(download.DownloadError, match=advice):
        download.download(tmp_path, [wrong.url])
    assert list(tmp_path.iterdir()) == []
    download.download(tmp_path, [wrong.url, serve(archive).url])
    assert_complete(tmp_path)


def test_an_endless_answer_cannot_fill_the_disk(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(handler: _Handler) -> None:
        handler.begin(200)
        while True:
            handler.wfile.write(archive)

    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    file = cifar.CIFAR10.binary.files[0]
    transfer._complete(serve(answer=endless).url, file, part_of(tmp_path), transfer.Pace(0), "CIFAR-10")
    assert len(archive) < part_of(tmp_path).stat().st_size <= len(archive) + 1000


def test_without_pyarrow_the_parquet_source_is_left(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name)
    )
    parquet, binary = serve(b""), serve(archive)
    download.download(tmp_path, [f"{parquet.url}.parquet", binary.url])
    assert_complete(tmp_path)
    assert parquet.asked == [] and "need pyarrow" in capsys.readouterr().err


def test_every_mirrors_reason_is_told(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    gone = serve(b"")  # answers 416 to everything
    file = (tmp_path / "no-such-file").as_uri()
    with pytest.raises(download.DownloadError) as caught:
        urls = ["http://[::1/x", gone.url, file, "ftp://127.0.0.1/x", "http://127.0.0.1:1/x"]
        download.download(tmp_path, urls)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "http://[::1/x: Invalid IPv6 URL",
        "127.0.0.1: HTTP 416",
        f"{file}: ",
        "127.0.0.1: not a http",
        "127.0.0.1: Connection refused",
    ):
        assert part in message


def test_mirrors_of_the_environment(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy.tar.gz").write_bytes(archive)
    monkeypatch.setenv("FASTTRAIN_MIRRORS", f"file:///no/such/file , {(tmp_path / 'copy.tar.gz').as_uri()}")
    download.download(tmp_path / "data")
    assert_complete(tmp_path / "data")


def test_strange_members_stay_in_the_archive(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = FOLDER
    evil = [
        "../evil",
        "/evil",
        "test_batch.bin",
        f"{here}/../evil",
        f"{here}/x/test_batch.bin",
        f"{here}/evil",
    ]
    root = tmp_path / "data"
    download.download(root, [serve(pack({**dict.fromkeys(evil, b""), **members()}, monkeypatch)).url])
    assert_complete(root)
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("content", [bytes(100_000), b""])
def test_a_member_of_another_size_is_refused(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    files = {**members(), f"{FOLDER}/data_batch_4.bin": content}
    with pytest.raises(download.DownloadError, match=rf"data_batch_4\.bin has {len(content)} bytes"):
        download.download(tmp_path, [serve(pack(files, monkeypatch)).url])
    assert list(tmp_path.iterdir()) == []


def test_other_images_are_refused(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {**members(), f"{FOLDER}/data_batch_4.bin": records(4, seed=99)}
    with pytest.raises(
        download.DownloadError, match=r"data_batch_4\.bin would not have the release's SHA-256"
    ):
        download.download(tmp_path, [serve(pack(files, monkeypatch)).url])
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo(f"{FOLDER}/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(ValueError, match="expected a regular file"):
        archives.unpack(cifar.CIFAR10.binary, [path], tmp_path / FOLDER, small_release(), verify=False)
    assert list(tmp_path.iterdir()) == [path]


def test_a_lacking_member_is_named(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    files = members()
    del files[f"{FOLDER}/test_batch.bin"]
    with pytest.raises(download.DownloadError, match=r"lacks test_batch\.bin"):
        download.download(tmp_path, [serve(pack(files, monkeypatch)).url])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_visible(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Path.write_bytes

    def write_two_then_fail(path: Path, content: bytes) -> int:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_two_then_fail)
    with pytest.raises(UserError, match="No space left on device"):
        download.download(tmp_path, [serve(archive).url])
    assert list(tmp_path.iterdir()) == [part_of(tmp_path)]


def test_an_unwritable_root_is_no_download_error(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        download.download(tmp_path / "file" / "data", [serve(archive).url])
    assert not isinstance(caught.value, download.DownloadError)


def test_files_placed_by_hand_are_never_overwritten(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    (write_release(tmp_path) / "data_batch_5.bin").unlink()
    mirror = serve(archive)
    with pytest.raises(UserError, match="move it away"):
        download.download(tmp_path, [mirror.url])
    assert mirror.asked == []


# Several sources
@pytest.mark.usefixtures("impatient")
def test_a_slow_source_is_left_and_its_bytes_are_kept(
    tmp_path: Path, archive: bytes, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = serve(archive, rate=30_000), serve(archive)
    download.download(tmp_path, [slow.url, fast.url])
    assert_complete(tmp_path)
    (asked,) = fast.asked
    assert asked and 0 < int(asked.removeprefix("bytes=").removesuffix("-")) < 30_000
    assert re.search(r"left 127\.0\.0\.1: slow, [123]?\d kB/s", capsys.readouterr().err)


@pytest.mark.usefixtures("impatient")
def test_another_form_of_the_release_stands_in_for_a_slow_one(
    tmp_path: Path, archive: bytes, python_archive: bytes, serve: Serve
) -> None:
    slow = serve(archive, rate=30_000)
    other = serve(python_archive, name="cifar-10-python.tar.gz", cuts=(20_000,))
    release = cifar.CIFAR10
    sources = (Source(release.binary, (slow.url,)), Source(release.python, (other.url,)))
    download.download(tmp_path, [], dataclasses.replace(release, sources=sources))
    assert_complete(tmp_path)
    assert slow.asked == [None] and other.asked == [None, "bytes=20000-"]


@pytest.fixture
def demanding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find everything slow, after 0.2 s."""
    monkeypatch.setattr(transfer, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(download, "SLOW_BYTES_PER_S", float("inf"))


@pytest.mark.usefixtures("demanding")
def test_where_all_are_slow_the_fastest_finishes(
    tmp_path: Path, archive: bytes, python_archive: bytes, serve: Serve
) -> None:
    slower = serve(archive, rate=50_000)
    slow = serve(python_archive, name="cifar-10-python.tar.gz", rate=150_000)
    download.download(tmp_path, [slower.url, "http://127.0.0.1:1/x", slow.url])
    assert_complete(tmp_path)
    assert slower.asked == [None]
    first, again = slow.asked
    assert first is None and again and again.startswith("bytes=")


@pytest.mark.usefixtures("demanding")
def test_a_source_that_fails_the_second_time_is_left_to_the_next_slow_one(
    tmp_path: Path, archive: bytes, python_archive: bytes, serve: Serve
) -> None:
    slow = serve(archive, rate=50_000)
    breaking = serve(python_archive, name="cifar-10-python.tar.gz", rate=150_000, cuts=(70_000, 0))
    download.download(tmp_path, [slow.url, breaking.url])
    assert_complete(tmp_path)
    assert len(breaking.asked) == len(slow.asked) == 2


@pytest.mark.usefixtures("impatient")
def test_drops_between_silences_are_slow_too(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    def drop(handler: _Handler) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        place = f"bytes {start}-{len(archive) - 1}/{len(archive)}"
        length = str(len(archive) - start)
        handler.begin(206 if start else 200, Content_Range=place, Content_Length=length)
        handler.wfile.write(archive[start : start + 1])
        time.sleep(1)

    dropping = serve(answer=drop)
    download.download(tmp_path, [dropping.url, serve(archive).url])
    assert_complete(tmp_path)
    assert 2 <= len(dropping.asked) <= 4


def status(code: int) -> Callable[[_Handler], None]:
    return lambda handler: handler.send_error(code)


def redirect(place: str) -> Callable[[_Handler], None]:
    return lambda handler: handler.begin(302, Location=place)


def page(handler: _Handler) -> None:
    handler.begin(200, Content_Type="text/html; charset=utf-8")
    handler.wfile.write(b"<html>Log in to this network</html>" * 4000)


def hang(handler: _Handler) -> None:
    time.sleep(1.5)


def hang_after_the_headers(handler: _Handler) -> None:
    handler.begin(200)
    time.sleep(1.5)


def answer_by_and_by(handler: _Handler) -> None:
    for _ in range(10):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" if not _ else b"X-Wait: 1\r\n")
        time.sleep(0.1)


def claim(length: int) -> Callable[[_Handler], None]:
    def answer(handler: _Handler) -> None:
        handler.begin(200, Content_Length=str(length))
        handler.wfile.write(bytes(1000))

    return answer


def other_range(handler: _Handler) -> None:
    handler.begin(206, Content_Range="bytes 0-9/10", Content_Length="10")
    handler.wfile.write(bytes(10))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(404), "HTTP 404"),
        (status(500), "HTTP 500"),
        (status(503), "HTTP 503"),
        (redirect("file:///etc/hostname"), "file:///etc/hostname"),
        (redirect("ftp://127.0.0.1/x"), "redirects to ftp://"),
        (redirect("/cifar-10-binary.tar.gz"), "HTTP 302 .*infinite loop"),
        (page, "a web page, not the file"),
        (hang, "no answer in 0.5 s"),
        (answer_by_and_by, "no answer in 0.5 s"),
        (hang_after_the_headers, "timed out"),
        (claim(1000), "its file has 1000 bytes; the release's has"),
        (claim(1 << 60), "its file has 1152921504606846976 bytes"),
        (claim(-1), "its file has -1 bytes"),
        (other_range, "another part of the file"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9\r\n"), "SSH-2.0"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1000), "100 headers"),
        (lambda handler: None, "closed connection"),
    ],
)
def test_a_broken_source_costs_little_and_the_next_is_tried(
    tmp_path: Path, archive: bytes, serve: Serve, answer: Callable[[_Handler], None], reason: str
) -> None:
    part_of(tmp_path).write_bytes(archive[:9000])  # of an earlier visit to another source
    with pytest.raises(download.DownloadError, match=reason):
        download.download(tmp_path, [serve(answer=answer).url])
    assert part_of(tmp_path).read_bytes() == archive[:9000]
    good = serve(archive)
    download.download(tmp_path, [serve(answer=answer).url, good.url])
    assert_complete(tmp_path)
    assert good.asked == ["bytes=9000-"]


def test_a_length_that_is_a_lie_is_found_out(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    """It claims the right length, but ends early, and starts anew each time it is asked."""

    def half(handler: _Handler) -> None:
        handler.begin(200, Content_Length=str(len(archive)))
        handler.wfile.write(archive[:9000])

    lying = serve(answer=half)
    with pytest.raises(download.DownloadError, match=f"it ends after 9000 of {len(archive)} bytes"):
        download.download(tmp_path, [lying.url])
    assert lying.asked == [None, "bytes=9000-"]


def test_a_redirect_to_another_server_is_followed(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    download.download(tmp_path, [serve(answer=redirect(serve(archive).url)).url])
    assert_complete(tmp_path)


def test_mirrors_come_before_the_releases_own_sources(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, own = serve(archive, cuts=(9000, 0)), serve(archive)
    monkeypatch.setenv("FASTTRAIN_MIRRORS", first.url)
    sources = (Source(cifar.CIFAR10.binary, (own.url,)),)
    download.download(tmp_path, release=dataclasses.replace(cifar.CIFAR10, sources=sources))
    assert_complete(tmp_path)
    assert first.asked == [None, "bytes=9000-"] and own.asked == ["bytes=9000-"]


def test_a_mirrors_form_is_told_by_its_name() -> None:
    release = cifar.CIFAR10
    for url, archive in (
        ("https://host/x/cifar-10-python.tar.gz", release.python),
        ("https://host/python/cifar-10-binary.tar.gz", release.binary),
        ("file:///copy.tgz", release.binary),
    ):
        assert download.mirror(url, release) == Source(archive, (url,))
    assert download.mirror("https://host/train/train-0-of-1.parquet?download=true", release).urls == (
        "https://host/train/train-0-of-1.parquet?download=true",
        "https://host/train/test-0-of-1.parquet?download=true",
    )


def test_the_sources_are_complete_and_of_known_archives() -> None:
    for release in releases.RELEASES.values():
        for source in release.sources:
            assert source.archive in release.archives and len(source.urls) == len(source.archive.files)
            assert all(url.startswith("https://") for url in source.urls)
            assert all(download.mirror(url, release).archive == source.archive for url in source.urls)
        names = [file.name for archive in release.archives for file in archive.files]
        assert len(set(names)) == len(names)


# Parquet
def offer_parquet(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, train: list[bytes], test: list[bytes]
) -> tuple[Mirror, Mirror]:
    """Servers of two Parquet files, which become the only source of CIFAR-10."""
    contents = parquet(train), parquet(test)
    names = "cifar-10-train.parquet", "cifar-10-test.parquet"
    mirrors = serve(contents[0], cuts=(9000,)), serve(contents[1])
    archive = Archive("parquet", "", tuple(map(remote, names, contents)))
    source = Source(archive, tuple(mirror.url for mirror in mirrors))
    publish(monkeypatch, dataclasses.replace(small_release(), parquet=archive, sources=(source,)))
    return mirrors


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 2, 1, 4, 0)])
def test_a_parquet_release_may_hold_the_files_in_any_order(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    *train, test = small_files().values()
    mirrors = offer_parquet(serve, monkeypatch, [train[index] for index in order], [test])
    download.download(tmp_path, [])
    assert_complete(tmp_path)
    assert [mirror.asked for mirror in mirrors] == [[None, "bytes=9000-"], [None]]


@pytest.mark.parametrize("damage", ["rows", "twice", "short", "test"])
def test_a_parquet_release_of_other_rows_is_refused(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    *train, test = small_files().values()
    if damage == "rows":  # two rows of the first file change places
        train[0] = train[0][3073 : 2 * 3073] + train[0][:3073] + train[0][2 * 3073 :]
    elif damage == "twice":
        train[1] = train[0]
    elif damage == "short":
        train[4] = train[4][:-3073]
    else:
        train[4], test = test[:3073] + train[4][3073:], test
    offer_parquet(serve, monkeypatch, train, [test])
    reason = r"rows \d+ to \d+ of .*parquet.part are no file of the rel"
    if damage == "short":
        reason = r"cifar-10-train.parquet.part has 19 rows, expected 20"
    with pytest.raises(download.DownloadError, match=reason):
        download.download(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("column", ["label", "img"])
@pytest.mark.parametrize("values", ["gone", ["cat"] * 20, [float("nan")] * 20, [{"bytes": 7}] * 20])
def test_parquet_columns_of_another_kind_are_refused(tmp_path: Path, column: str, values: Any) -> None:
    *train, test = small_files().values()
    paths = tmp_path / "train.parquet", tmp_path / "test.parquet"
    table = pyarrow.parquet.read_table(io.BytesIO(parquet(train)))
    table = table.drop_columns([column])
    if values != "gone":
        table = table.append_column(column, pyarrow.array(values))
    pyarrow.parquet.write_table(table, paths[0])
    paths[1].write_bytes(parquet([test]))
    with pytest.raises(ValueError, match=r"^train\.parquet: expected img.bytes, of bytes, and label"):
        archives.unpack(releases.CIFAR10.parquet, paths, tmp_path / "out", small_release(), verify=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_parquet_is_refused(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"PAR1" + bytes(1000) + b"PAR1"
    files = remote("cifar-10-train.parquet", content), remote("cifar-10-test.parquet", content)
    archive = Archive("parquet", "", files)
    source = Source(archive, (serve(content).url,) * 2)
    with pytest.raises(download.DownloadError, match=r"cifar-10-train\.parquet\.part: "):
        download.download(
            tmp_path, [], dataclasses.replace(small_release(), parquet=archive, sources=(source,))
        )
    assert list(tmp_path.iterdir()) == []


# The data folder
@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_folder_of_photos_is_no_data_folder(tmp_path: Path, inside: str) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / inside / name).mkdir(parents=True)
        (tmp_path / inside / name / "1.JPG").write_bytes(b"")
    for data in ("auto", "cifar10", "cifar100"):
        with pytest.raises(
            UserError, match=f"{tmp_path}: holds folders of images; .*--data folder:{tmp_path}"
        ):
            load_dataset(data, tmp_path, log=pytest.fail)
    assert not list(tmp_path.glob("cifar*"))


def test_other_folders_are_no_hindrance(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    for name in ("images/train/cat", "images/train/dog", "photos"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"")
    download.download(tmp_path, [serve(archive).url])
    assert (tmp_path / FOLDER).is_dir()


# CIFAR-100
def records_100(count: int, seed: int) -> bytes:
    content = np.random.default_rng(seed).integers(0, 256, (count, 3074), np.uint8)
    content[:, 0] %= 20
    content[:, 1] %= 100
    return content.tobytes()


def files_100() -> dict[str, bytes]:
    return {"train.bin": records_100(10, 1), "test.bin": records_100(4, 2)}


def small_100(**changes: object) -> Release:
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files_100().items()}
    small = dataclasses.replace(releases.CIFAR100, sha256=sha256, train_images=10, test_images=4, sources=())
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["binary", "python", "parquet"])
def test_cifar_100_is_fetched_in_any_form(tmp_path: Path, serve: Serve, form: str) -> None:
    files = files_100()
    labels = ("coarse_label", "fine_label")
    if form == "binary":
        contents = [tar_gz({f"cifar-100-binary/{name}": content for name, content in files.items()})]
    elif form == "python":
        plural = tuple(f"{label}s" for label in labels)
        members = {
            f"cifar-100-python/{name[:-4]}": pickle_of(content, labels=plural)
            for name, content in files.items()
        }
        contents = [tar_gz(members)]
    else:
        contents = [parquet([content], labels) for content in files.values()]
    known: Archive = getattr(releases.CIFAR100, form)
    remotes = tuple(remote(file.name, content) for file, content in zip(known.files, contents, strict=True))
    archive = dataclasses.replace(known, files=remotes)
    source = Source(archive, tuple(serve(content).url for content in contents))
    download.download(tmp_path, [], small_100(**{form: archive, "sources": (source,)}))
    folder = tmp_path / "cifar-100-binary"
    assert {name: (folder / name).read_bytes() for name in files} == files
    names = (folder / "fine_label_names.txt").read_text().splitlines()
    assert len(names) == 100 and names[26] == "crab" and names == sorted(names)


def test_the_fine_labels_of_cifar_100_are_read(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = files_100()
    archive = tar_gz({f"cifar-100-binary/{name}": content for name, content in files.items()})
    binary = Archive("binary", "cifar-100-binary", (remote("cifar-100-binary.tar.gz", archive),))
    monkeypatch.setitem(cifar.RELEASES, "cifar100", small_100(binary=binary))
    mirror = serve(archive, cuts=(9000,))
    monkeypatch.setenv("FASTTRAIN_MIRRORS", mirror.url)
    data = load_dataset("cifar100", tmp_path, log=pytest.fail)
    assert mirror.asked == [None, "bytes=9000-"]
    raw = np.frombuffer(files["train.bin"], np.uint8).reshape(10, 3074)
    assert np.array_equal(data.train.labels, raw[:, 1]) and len(data.test.labels) == 4
    assert np.array_equal(data.train.images.transpose(0, 3, 1, 2).reshape(10, -1), raw[:, 2:])
    assert data.name == "CIFAR-100" and data.classes[99] == "worm"
    show_dataset(data)
    assert "test.bin" in capsys.readouterr().out
    assert find_dataset(RunImages(name="CIFAR-100"), data_dir=tmp_path).classes == data.classes
    folder = tmp_path / "cifar-100-binary"
    (folder / "fine_label_names.txt").unlink()
    assert cifar.read(tmp_path, small_100()).classes == data.classes
    assert cifar.read(tmp_path, releases.CIFAR100).name == "CIFAR-100 (unverified)"
    (folder / cifar.NAME_FILE).write_text('{"name": "cifar-100"}')
    with pytest.raises(UserError, match="not that release"):
        cifar.read(tmp_path, releases.CIFAR100)


def test_cifar_100_never_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTTRAIN_MIRRORS", raising=False)
    source = Source(releases.CIFAR100.binary, ("file:///no/such/file",))
    nowhere = dataclasses.replace(releases.CIFAR100, sources=(source,))
    monkeypatch.setitem(cifar.RELEASES, "cifar100", nowhere)
    with pytest.raises(download.DownloadError, match=r"CIFAR-100 could not be .*file:///no/such/file: "):
        load_dataset("cifar100", tmp_path, log=pytest.fail)
    (tmp_path / "cifar-100-binary").mkdir()
    for name in releases.CIFAR100.files:
        (tmp_path / "cifar-100-binary" / name).write_bytes(bytes(3073))
    with pytest.raises(UserError, match=r"train\.bin: 3073 bytes, .*3074 \(153700000 in the release"):
        load_dataset("cifar100", tmp_path, log=pytest.fail)
