"""The statistics of all benchmarks: spreads, means with confidence intervals, paired differences, slopes."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(samples: Sequence[float]) -> float:
    """Half the range of the samples, relative to their median: the ± of all tables of times."""
    return (max(samples) - min(samples)) / 2 / statistics.median(samples)


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None for a single value), median, smallest, largest and n."""
    return {
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def t_quantile(degrees: int) -> float:
    """The t that Student's distribution stays within on both sides with probability 95%.

    Its probability is a finite sum for whole degrees of freedom; halving an interval inverts it.
    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """

    def inside(t: float) -> float:
        angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
        term, total = math.sin(angle) * (math.cos(angle) if odd else 1.0), 0.0
        for k in range(degrees // 2):
            total += term
            term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, n, and the 95% confidence interval of the mean (Student's t); None for a single value."""
    mean, n = statistics.mean(values), len(values)
    interval = None
    if n > 1:
        half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "n": n}


def compare(accuracy: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Per name its accuracy, given by seed, and its difference from the first name's on the seeds of both."""
    base = next(iter(accuracy.values()))
    rows = []
    for name, by_seed in accuracy.items():
        pairs = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
        if pairs:
            difference = None if by_seed is base else mean_interval(pairs)
            rows.append(
                {"name": name, "accuracy": mean_interval(list(by_seed.values())), "difference": difference}
            )
    return rows


def exponents(values: Sequence[int], samples: Sequence[Sequence[float]]) -> list[float]:
    """The fitted slope of log(seconds) over log(value), one for every round; samples: by value, by round."""
    logs = [math.log(value) for value in values]
    return [float(np.polyfit(logs, np.log(column), 1)[0]) for column in zip(*samples, strict=True)]
