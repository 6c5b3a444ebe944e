"""A capture is made safe from other threads, and one that fails twice says so. CUDA is a stand-in here."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fasttrain import cuda_graph
from fasttrain.cuda_graph import CaptureError, capture


class FakeCuda:
    """Streams that do nothing, and captures of which the first `failures` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self.failures, self.events, self.replays = failures, list[str](), 0
        self.pools: list[object] = []
        self.stream = SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Stream": lambda *_: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda *_: self.stream,
            "stream": self._on,
            "synchronize": lambda *_: self.events.append("synchronize"),
            "CUDAGraph": lambda: SimpleNamespace(replay=self._replay),
            "graph": self._graph,
            "graph_pool_handle": object,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(gc, "collect", lambda *_: self.events.append("collect"))

    def _replay(self) -> None:
        self.replays += 1

    @contextlib.contextmanager
    def _on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def _graph(self, graph: object, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        self.pools.append(pool)
        self.events.append("capture")
        before, self.stream = self.stream, SimpleNamespace()
        yield
        if self.failures:  # as torch's own does: it ends the capture, and only then leaves its stream
            self.failures -= 1
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nline 2")
        self.stream = before


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)


def test_a_capture_begins_without_garbage_and_with_nothing_under_way(monkeypatch) -> None:
    cuda, calls = FakeCuda(monkeypatch, failures=0), []
    [replay] = capture([lambda *_: calls.append(gc.isenabled())], *batch())
    assert cuda.events == ["collect", "synchronize", "capture"]
    assert calls == [True] * cuda_graph.WARM_UP_CALLS + [False] and gc.isenabled()
    replay(*batch())
    assert cuda.replays == 1


def test_captures_of_several_works_share_memory_and_the_batch(monkeypatch) -> None:
    cuda, calls = FakeCuda(monkeypatch, failures=0), []
    first, second = capture(
        [lambda *given: calls.append(given), lambda *given: calls.append(given)], *batch()
    )
    assert len(cuda.pools) == 2 and cuda.pools[0] is cuda.pools[1]
    assert len({images.data_ptr() for images, _ in calls}) == 1
    first(*batch())
    second(*batch())
    assert cuda.replays == 2


def test_a_disturbed_capture_is_tried_once_more(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch, failures=1)
    stream, kept = cuda.stream, []

    def work(*_: torch.Tensor) -> None:
        activations = torch.zeros(1)
        assert all(reference() is None for reference in kept[cuda_graph.WARM_UP_CALLS :]), (
            "of a failed attempt"
        )
        kept.append(weakref.ref(activations))

    capture([work], *batch())
    assert cuda.events == 2 * ["collect", "synchronize", "capture"] and gc.isenabled()
    assert cuda.stream is stream


def test_one_that_fails_twice_is_an_error_of_one_line(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch, failures=2)
    stream = cuda.stream
    with pytest.raises(CaptureError, match=r"^CUDA error: operation failed .* line 2$"):
        capture([lambda *_: None], *batch())
    assert cuda.events.count("capture") == 2 and gc.isenabled()
    assert cuda.stream is stream  # what comes next runs where its memory belongs


def test_an_error_before_the_capture_is_not_blamed_on_it(monkeypatch) -> None:
    FakeCuda(monkeypatch, failures=0)

    def work(*_: torch.Tensor) -> None:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image") as error:
        capture([work], *batch())
    assert not isinstance(error.value, CaptureError)
