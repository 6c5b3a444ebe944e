import dataclasses
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.load_dataset import load_dataset
from fasttrain.data.run_images import RunImages, find_dataset
from fasttrain.data.sources import cifar, download, releases
from fasttrain.errors import UserError
from fasttrain.tools.show_data import show_dataset
from tests.helpers import SMALL_RELEASE, pretend, records, write_release


class Mirror(ThreadingHTTPServer):
    """Serves one archive. cuts: after how many bytes the first connections break."""

    daemon_threads = True

    def __init__(self, content: bytes, ranges: bool = True, cuts: tuple[int, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.ranges, self.cuts = content, ranges, list(cuts)
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/cifar-10-binary.tar.gz"


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror = self.server
        asked = self.headers.get("Range")
        mirror.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and mirror.ranges else 0
        if start >= len(mirror.content):
            self.send_error(416)
            return
        body = mirror.content[start:]
        self.send_response(206 if start else 200)
        if start:
            size = len(mirror.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: mirror.cuts.pop(0)] if mirror.cuts else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Serve = Callable[..., Mirror]


@pytest.fixture
def serve() -> Iterator[Serve]:
    mirrors: list[Mirror] = []

    def start(content: bytes, **how: object) -> Mirror:
        mirror = Mirror(content, **how)  # type: ignore[arg-type]
        mirrors.append(mirror)
        threading.Thread(target=mirror.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return mirror

    yield start
    for mirror in mirrors:
        mirror.shutdown()
        mirror.server_close()


def members() -> dict[str, bytes]:
    """The release's layout in small."""
    files = {
        f"{cifar.CIFAR10.folder}/{name}": records(SMALL_RELEASE, seed)
        for seed, name in enumerate(cifar.CIFAR10.files)
    }
    return {
        **files,
        f"{cifar.CIFAR10.folder}/{cifar.CIFAR10.classes_file}": "\n".join(cifar.CIFAR10.classes).encode()
        + b"\n\n",
    }


def pack(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive of `files`, which becomes the release's archive for this test."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = buffer.getvalue()
    pretend(
        monkeypatch,
        train_images=5 * SMALL_RELEASE,
        test_images=SMALL_RELEASE,
        archive_bytes=len(archive),
        archive_md5=hashlib.md5(archive).hexdigest(),
    )
    return archive


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    return pack(members(), monkeypatch)


def assert_complete(root: Path) -> None:
    folder = root / cifar.CIFAR10.folder
    assert list(root.iterdir()) == [folder]  # neither the archive nor a temporary folder
    assert {
        f"{cifar.CIFAR10.folder}/{path.name}": path.read_bytes() for path in folder.iterdir()
    } == members()


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


def test_a_server_without_ranges_starts_anew(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    part_of(tmp_path).write_bytes(archive[:5000])
    mirror = serve(archive, ranges=False)
    download.download(tmp_path, [mirror.url])
    assert_complete(tmp_path)
    assert mirror.asked == ["bytes=5000-"]


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
    advice = "not the release's.*cifar-10-batches-bin yourself.*--data synthetic"
    with pytest.raises(download.DownloadError, match=advice):
        download.download(tmp_path, [wrong.url])
    assert list(tmp_path.iterdir()) == []
    download.download(tmp_path, [wrong.url, serve(archive).url])
    assert_complete(tmp_path)


def test_an_endless_answer_cannot_fill_the_disk(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    download._transfer(serve(archive * 100).url, part_of(tmp_path), cifar.CIFAR10)
    assert part_of(tmp_path).stat().st_size <= len(archive) + 1000


def test_every_mirrors_reason_is_told(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    gone = serve(b"")  # answers 416 to everything
    file = (tmp_path / "no-such-file").as_uri()
    with pytest.raises(download.DownloadError) as caught:
        download.download(tmp_path, [gone.url, file, "ftp://127.0.0.1/x", "http://127.0.0.1:1/x"])
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{gone.url}: HTTP 416", f"{file}: ", "ftp://127.0.0.1/x: not a", "http://127.0.0.1:1/x: "):
        assert part in message


def test_mirrors_of_the_environment(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy.tar.gz").write_bytes(archive)
    monkeypatch.setenv("FASTTRAIN_MIRRORS", f"file:///no/such/file , {(tmp_path / 'copy.tar.gz').as_uri()}")
    download.download(tmp_path / "data")
    assert_complete(tmp_path / "data")


def test_strange_members_stay_in_the_archive(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = cifar.CIFAR10.folder
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_4.bin", bytes(100_000)),
        ("data_batch_4.bin", b""),
        (cifar.CIFAR10.classes_file, b"?" * 5000),
    ],
)
def test_a_member_of_another_size_is_refused(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    files = {**members(), f"{cifar.CIFAR10.folder}/{name}": content}
    with pytest.raises(UserError, match=f"{name} has {len(content)} bytes"):
        download.download(tmp_path, [serve(pack(files, monkeypatch)).url])
    assert not (tmp_path / cifar.CIFAR10.folder).exists()


def test_a_link_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, train_images=0)
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo(f"{cifar.CIFAR10.folder}/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(UserError, match="not a regular file"):
        download._unpack(path, tmp_path / cifar.CIFAR10.folder, cifar.CIFAR10)


def test_a_lacking_member_is_named(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    files = members()
    del files[f"{cifar.CIFAR10.folder}/test_batch.bin"]
    with pytest.raises(UserError, match=r"lacks test_batch\.bin"):
        download.download(tmp_path, [serve(pack(files, monkeypatch)).url])
    assert not (tmp_path / cifar.CIFAR10.folder).exists()


def test_a_full_disk_leaves_nothing_visible(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[object] = []

    def copy_two_then_fail(source: io.BufferedReader, target: io.BufferedWriter) -> None:
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        copied.append(target.write(source.read()))

    monkeypatch.setattr(download.shutil, "copyfileobj", copy_two_then_fail)
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


def records_100(count: int, seed: int) -> bytes:
    content = np.random.default_rng(seed).integers(0, 256, (count, 3074), np.uint8)
    content[:, 0] %= 20
    content[:, 1] %= 100
    return content.tobytes()


def members_100() -> dict[str, bytes]:
    names = "\n".join(f"fine {n}" for n in range(100)).encode() + b"\n"
    files = {"train.bin": records_100(10, 1), "test.bin": records_100(4, 2), "fine_label_names.txt": names}
    return {f"cifar-100-binary/{name}": content for name, content in files.items()}


def test_cifar_100_is_fetched_and_its_fine_labels_read(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = members_100()
    archive = pack({**files, "cifar-100-binary/coarse_label_names.txt": b"coarse"}, monkeypatch)
    release = dataclasses.replace(
        releases.CIFAR100,
        train_images=10,
        test_images=4,
        archive_bytes=len(archive),
        archive_md5=hashlib.md5(archive).hexdigest(),
    )
    monkeypatch.setitem(cifar.RELEASES, "cifar100", release)
    mirror = serve(archive, cuts=(9000,))
    monkeypatch.setenv("FASTTRAIN_MIRRORS", mirror.url)
    data = load_dataset("cifar100", tmp_path, log=pytest.fail)
    assert mirror.asked == [None, "bytes=9000-"]
    folder = tmp_path / "cifar-100-binary"
    assert not (folder / "coarse_label_names.txt").exists()
    raw = np.frombuffer(files["cifar-100-binary/train.bin"], np.uint8).reshape(10, 3074)
    assert np.array_equal(data.train.labels, raw[:, 1]) and len(data.test.labels) == 4
    assert np.array_equal(data.train.images.transpose(0, 3, 1, 2).reshape(10, -1), raw[:, 2:])
    assert data.name == "CIFAR-100 (unverified)" and data.classes[99] == "fine 99"
    show_dataset(data)
    assert "test.bin" in capsys.readouterr().out
    verified = dataclasses.replace(
        release,
        sha256={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in release.files},
    )
    assert cifar.read(tmp_path, verified).name == "CIFAR-100"
    assert find_dataset(RunImages(name="CIFAR-100 (unverified)"), data_dir=tmp_path).classes == data.classes
    (folder / cifar.NAME_FILE).write_text('{"name": "cifar-100"}')
    with pytest.raises(UserError, match="not that release"):
        cifar.read(tmp_path, release)
    (folder / cifar.NAME_FILE).unlink()
    (folder / "fine_label_names.txt").unlink()
    with pytest.raises(UserError, match=r"fine_label_names\.txt: no names of classes"):
        cifar.read(tmp_path, release)


def test_cifar_100_never_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTTRAIN_MIRRORS", raising=False)
    nowhere = dataclasses.replace(releases.CIFAR100, url="file:///no/such/file")
    monkeypatch.setitem(cifar.RELEASES, "cifar100", nowhere)
    with pytest.raises(download.DownloadError, match=r"CIFAR-100 could not be .*file:///no/such/file: "):
        load_dataset("cifar100", tmp_path, log=pytest.fail)
    (tmp_path / "cifar-100-binary").mkdir()
    for name in releases.CIFAR100.files:
        (tmp_path / "cifar-100-binary" / name).write_bytes(bytes(3073))
    with pytest.raises(UserError, match=r"train\.bin: 3073 bytes, .*3074 \(153700000 in the release"):
        load_dataset("cifar100", tmp_path, log=pytest.fail)
