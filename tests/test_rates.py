import pytest
import torch

from fasttrain.system import machine, precision, rates

CPU = torch.device("cpu")


def test_rates_are_positive() -> None:
    before = torch.get_rng_state()
    assert rates.measure_matmul_tflops(CPU, torch.float32, seconds=0.05) > 0
    assert torch.equal(torch.get_rng_state(), before)  # what a caller draws does not hang on it
    assert rates.measure_copy_gbps(CPU, seconds=0.05) > 0


@pytest.mark.parametrize(("seconds", "side"), [(1e-3, 2048), (1.0, 512)])
def test_a_cpu_that_emulates_a_precision_is_measured_with_smaller_matrices(
    seconds: float, side: int, monkeypatch
) -> None:
    """At a second for a product of 512, one of 2,048 would take a minute."""
    monkeypatch.setattr(rates, "best_seconds", lambda *_: seconds)
    assert rates.measure_matmul_tflops(CPU, torch.float32) == 2 * side**3 / seconds / 1e12


def test_a_glance_takes_a_few_products_and_is_near_the_measured_rate(monkeypatch) -> None:
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or multiply(*args, **kwargs))
    glance = rates.glance_at_matmul_tflops(CPU, torch.float32)
    assert len(products) == 2  # to warm up, and to measure
    assert 0.2 < glance / rates.measure_matmul_tflops(CPU, torch.float32, seconds=0.05, side=1024) < 5


@pytest.mark.gpu
def test_compute_on_a_gpu() -> None:
    device = machine.pick_device("auto")
    assert device.type == "cuda"
    assert rates.measure_matmul_tflops(device, precision.DTYPES[precision.pick_precision("auto", device)]) > 1
