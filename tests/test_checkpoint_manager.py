import pytest

from fasttrain.checkpoint.manager import SaveInterval
from fasttrain.errors import UserError


@pytest.mark.parametrize(
    ("text", "interval"), [("500", SaveInterval(steps=500)), ("30s", SaveInterval(seconds=30))]
)
def test_save_every_is_steps_or_seconds(text: str, interval: SaveInterval) -> None:
    assert SaveInterval.parse(text) == interval
    assert [SaveInterval.parse("3").over(steps, 1e9) for steps in (2, 3)] == [False, True]
    assert [SaveInterval.parse("3s").over(10**9, seconds) for seconds in (2.9, 3.0)] == [False, True]


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "5m", "1.5", "often", "s"])
def test_save_every_refuses_anything_else(text: str) -> None:
    with pytest.raises(UserError, match="--save-every"):
        SaveInterval.parse(text)
