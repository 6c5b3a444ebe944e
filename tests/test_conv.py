"""The faster gradient is the gradient, and is taken only where it is faster."""

import pytest
import torch
from torch import nn

from fasttrain import conv
from fasttrain.conv import Conv3x3, join, joining_pays


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU computes what a CPU with AMX computes, only slower."""
    monkeypatch.setattr(conv, "has_amx", lambda: True)


def gradients(layer: nn.Conv2d, images: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        outputs = layer(images)
    outputs.float().square().sum().backward()
    assert images.grad is not None and layer.weight.grad is not None
    found = [outputs.detach().float(), images.grad, layer.weight.grad.clone()]
    layer.weight.grad = None
    return found


@pytest.mark.parametrize(("count", "side"), [(64, 4), (40, 7), (3, 8), (1, 1), (32, 2)])
def test_outputs_and_gradients_are_those_of_torchs_own_layer(count: int, side: int, amx: None) -> None:
    torch.manual_seed(0)
    ours, torchs = Conv3x3(16, 24), nn.Conv2d(16, 24, 3, padding=1, bias=False)
    torchs.load_state_dict(ours.state_dict())
    images = torch.randn(count, 16, side, side).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joining_pays(images)
    exact = gradients(torchs.double(), images.double(), torch.float32)
    for found, expected in zip(gradients(ours, images, torch.bfloat16), exact, strict=True):
        assert (found - expected).norm() / expected.norm() < 0.01  # bf16 has 8 bits
        assert found.dtype == torch.float32


def test_images_are_joined_by_columns_of_zeros() -> None:
    images = torch.arange(1.0, 65 * 6 + 1).reshape(65, 1, 2, 3)
    joined = join(images)
    assert joined.shape == (65, 1, 2, 4)  # 65 and 32 have no common divisor: each stays by itself
    joined = join(images[:64])
    assert joined.shape == (2, 1, 2, 32 * 4)
    assert torch.equal(joined[1, 0, :, 4:7], images[33, 0]) and not joined[..., 3::4].any()
    assert joined.is_contiguous(memory_format=torch.channels_last)


def test_it_is_left_out_wherever_it_does_not_pay(amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)
    assert not joining_pays(small)  # float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joining_pays(small) and not joining_pays(large)
        assert not joining_pays(small.to("meta"))
        layer = Conv3x3(3, 4)
        assert type(layer(small).grad_fn).__name__ == "_JoinedGradientBackward"
        with torch.no_grad():
            assert layer(small).grad_fn is None
        assert type(layer(large).grad_fn).__name__ == "ConvolutionBackward0"
        monkeypatch.setattr(conv, "has_amx", lambda: False)
        assert not joining_pays(small)
