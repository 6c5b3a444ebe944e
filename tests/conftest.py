"""Tests marked `gpu` run where there is an NVIDIA GPU, and are skipped with a reason elsewhere.

`gpu(seconds=5)` tells how long such a test may take. The shortest come first: a visit to a GPU may end early.
"""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

# Set before anything imports torch, and inherited by every process that a test starts: the networks are tiny
# and the tests run side by side, so a second thread would only take a core from another test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fasttrain.data import dataset
from fasttrain.data.sources import cifar, synthetic, transfer

GPU_SECONDS, ALL_GPU_SECONDS = 1.0, 120.0
"""How long a test marked `gpu` takes unless its mark says otherwise, and how long all of them may take."""


def gpu_seconds(item: pytest.Item) -> float:
    """The seconds that a test may take on a GPU; 0 for one that needs none."""
    return max((mark.kwargs.get("seconds", GPU_SECONDS) for mark in item.iter_markers("gpu")), default=0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not above: the process that hands the tests out to others starts without it

    items.sort(key=gpu_seconds)
    together = sum(map(gpu_seconds, items))
    if together > ALL_GPU_SECONDS:
        raise pytest.UsageError(f"tests marked gpu take {together:.0f} s, and may take {ALL_GPU_SECONDS:.0f}")
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is compiled out of the user's own folder."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "compiled"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let downloads reach servers on this machine only."""
    open_url = transfer._open

    def open_here(url: str, offset: int) -> Any:
        with suppress(ValueError):  # a malformed URL
            if urlsplit(url).hostname not in (None, "127.0.0.1"):
                raise transfer.SourceError("the tests use no network")
        return open_url(url, offset)

    monkeypatch.setattr(transfer, "_open", open_here)


@pytest.fixture(scope="session", autouse=True)
def quick_rate() -> Iterator[None]:
    """Let a training measure the machine's rate on small matrices, in no time instead of a second or two."""
    from fasttrain import trainer

    measure = functools.partial(trainer.measure_matmul_tflops, seconds=0.01, side=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "measure_matmul_tflops", measure)
        patch.setattr(trainer, "glance_at_matmul_tflops", measure)
        yield


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds a small synthetic set: 64 training and 40 test images."""
    folder = tmp_path_factory.mktemp("data")
    synthetic.generate(folder, train_count=64, test_count=40)
    return folder


@pytest.fixture(scope="session")
def dataset(dataset_dir: Path) -> dataset.Dataset:
    return cifar.read(dataset_dir)


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Ctrl-C as at a terminal: what a shell starts in the background ignores it, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
