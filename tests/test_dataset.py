import numpy as np
import pytest

from fasttrain.data import dataset


def test_statistics_match_float64() -> None:
    # More than one chunk, a different spread per channel.
    images = np.random.default_rng(0).integers(0, [90, 180, 256], (1700, 8, 8, 3), np.uint8)
    mean, std = dataset.channel_statistics(images)
    reference = images.astype(np.float64) / 255
    assert mean == pytest.approx(reference.mean((0, 1, 2)), rel=1e-12)
    assert std == pytest.approx(reference.std((0, 1, 2)), rel=1e-12)
