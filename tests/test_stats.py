"""The statistics of benchmarks, against textbooks and by hand."""

import pytest

from benchmarks import stats


def test_the_spread_is_half_the_range_of_the_median() -> None:
    assert stats.spread([9.0, 10.0, 12.0]) == pytest.approx(0.15)


def test_a_description_keeps_the_extremes_and_n() -> None:
    found = stats.describe([1.0, 2.0, 6.0])
    assert found == {
        "mean": 3.0,
        "stdev": pytest.approx(7**0.5),
        "median": 2.0,
        "min": 1.0,
        "max": 6.0,
        "n": 3,
    }
    assert stats.describe([1.0])["stdev"] is None


def test_intervals_are_students() -> None:
    """Against the tables of every textbook."""
    tabled = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 199: 1.972}
    assert {df: round(stats.t_quantile(df), 3) for df in tabled} == tabled
    summary = stats.mean_interval([1.0, 2.0, 3.0])
    assert (summary["mean"], summary["n"]) == (2, 3)
    assert summary["interval"] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], rel=1e-4)
    assert stats.mean_interval([1.0])["interval"] is None


def test_exponents_are_the_slopes_of_every_round() -> None:
    values = [2, 4, 8]
    assert stats.exponents(values, [[4.0, 2.0], [16.0, 4.0], [64.0, 8.0]]) == pytest.approx([2.0, 1.0])
