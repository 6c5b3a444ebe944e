import time
from collections.abc import Iterator

from fasttrain.system.throughput import WaitTimer, watch


def batches(slow: int) -> Iterator[int]:
    for number in range(3):
        if number == slow:
            time.sleep(0.4)
        yield number


def warnings(slow: int, pause: float) -> list[float]:
    said: list[float] = []
    timer = WaitTimer(batches(slow))
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
