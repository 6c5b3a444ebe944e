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
        self.spoiled: list[object] = []
        self.stream = SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Stream": lambda *_: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda *_: self.stream,
            "stream": self._on,
            "synchronize": lambda *_: self.events.append("synchronize"),
            "CUDAGraph": self._new_graph,
            "graph": self._graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(gc, "collect", lambda *_: self.events.append("collect"))

    def _new_graph(self) -> SimpleNamespace:
        memory = object()
        return SimpleNamespace(replay=self._replay, pool=lambda: memory)

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
        assert pool is None or pool not in self.spoiled, "torch refuses to record to it"
        self.pools.append(pool)
        self.events.append("capture")
        before, self.stream = self.stream, SimpleNamespace()
        yield
        if self.failures:  # as torch's own does: it ends the capture, and only then leaves its stream
            self.failures -= 1
            self.spoiled.append(pool)
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


def test_captures_share_memory_and_the_batch(monkeypatch) -> None:
    cuda, calls = FakeCuda(monkeypatch, failures=0), []
    replays = capture([lambda *given: calls.append(given)] * 3, *batch())
    first, second, third = cuda.pools
    assert first is None and second is not None and third is not None
    assert len({images.data_ptr() for images, _ in calls}) == 1
    for replay in replays:
        replay(*batch())
    assert cuda.replays == 3


def test_the_memory_of_a_capture_that_failed_is_not_used_again(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch, failures=0)

    def disturb(*_: torch.Tensor) -> None:
        cuda.failures = 1 if len(cuda.pools) == 2 and not gc.isenabled() else cuda.failures

    assert len(capture([lambda *_: None, lambda *_: None, lambda *_: None], *batch())) == 3
    cuda.pools.clear()
    assert len(capture([lambda *_: None, disturb, lambda *_: None], *batch())) == 3
    assert [pool is None for pool in cuda.pools] == [True, False, True, False]


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
