import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fasttrain.system.throughput import WaitTimer, watch
from tests.helpers import CPU


def batches(slow: int) -> Iterator[int]:
    for number in range(3):
        if number == slow:
            time.sleep(0.4)
        yield number


def warnings(slow: int, pause: float) -> list[float]:
    said: list[float] = []
    timer = WaitTimer(batches(slow), CPU)
    with watch(timer, said.append, seconds=0.1):
        for _ in timer:
            time.sleep(pause)
    return said


def test_a_starved_loop_says_so_once_per_wait() -> None:
    [seconds] = warnings(slow=1, pause=0)
    assert seconds >= 0.1


def test_a_slow_step_is_no_starvation() -> None:
    """Compiling and evaluating happen outside the wait for a batch."""
    assert warnings(slow=-1, pause=0.3) == []


def test_on_a_cpu_the_hosts_clock_counts_and_a_resumed_epoch_goes_on_from_its_seconds() -> None:
    timer = WaitTimer(batches(slow=1), CPU, wait_seconds=10.0)
    assert list(timer) == [0, 1, 2]
    assert 10.4 <= timer.wait_seconds < 10.8


class Stream:
    """A stand-in for a GPU's stream: work and events queue up, and pass when the device gets to them."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.now, self.events = 0.0, 0

    def work(self, milliseconds: float) -> None:
        self.queue.append(milliseconds)

    def advance(self) -> None:
        """Let the device do all that is queued, as waiting for it does."""
        for entry in self.queue:
            if isinstance(entry, float):
                self.now += entry
            else:
                entry.passed = self.now
        self.queue.clear()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            stream.events += 1

        def record(self, on: Stream) -> None:
            self.passed = None
            on.queue.append(self)

        def query(self) -> bool:
            return self.passed is not None

        def elapsed_time(self, end: "Event") -> float:
            return end.passed - self.passed  # a TypeError for an event that has not passed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


def test_on_a_gpu_the_stream_waits_from_the_end_of_a_step_until_the_next_batch_is_ready(stream) -> None:
    def loader() -> Iterator[int]:
        for number in range(3):
            stream.work(5.0 * number)  # what the loader does on the stream, or makes it wait for
            yield number

    timer = WaitTimer(loader(), torch.device("cuda"), wait_seconds=1.0)
    for _ in timer:
        time.sleep(0.01)  # the host's time is not the stream's
        stream.work(40.0)
        assert timer.wait_seconds == 1.0  # nothing has passed, and nobody waits for it
    stream.advance()
    assert timer.wait_seconds == pytest.approx(1.015)
    assert stream.now == 135.0


def test_events_are_used_again_once_they_have_passed(stream) -> None:
    timer = WaitTimer(range(100), torch.device("cuda"))
    for number in timer:
        stream.work(1.0)
        if number % 5 == 4:  # the device is at most five steps behind
            stream.advance()
    assert stream.events == 2 * 5
