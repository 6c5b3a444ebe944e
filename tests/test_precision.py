"""Precision is what the machine has, and what it is asked for."""

import platform
import subprocess
import sys

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.system import precision

CPU = torch.device("cpu")


def give_cpu_instructions(monkeypatch: pytest.MonkeyPatch, **instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("instruction", "dtype"),
    [
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("avx512_f", torch.float32),
    ],
)
def test_auto_takes_bf16_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, instruction: str, dtype: torch.dtype
) -> None:
    give_cpu_instructions(monkeypatch, **{instruction: True})
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: 2.4)
    assert precision.DTYPES[precision.pick_precision("auto", CPU)] == dtype


def test_auto_leaves_bf16_where_the_cpu_is_slower_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    give_cpu_instructions(monkeypatch, avx512_bf16=True)
    measured, threads, ours = {torch.float32: 0.28, torch.bfloat16: 0.16}, set(), torch.get_num_threads()

    def measure(device: torch.device, dtype: torch.dtype, **_: object) -> float:
        threads.add(torch.get_num_threads())
        return measured[dtype]

    monkeypatch.setattr(precision, "measure_matmul_tflops", measure)
    precision.bf16_speedup_on_cpu.cache_clear()
    try:
        assert precision.DTYPES[precision.pick_precision("auto", CPU)] == torch.float32
        # Whoever asks for it gets it.
        assert precision.DTYPES[precision.pick_precision("bf16", CPU)] == torch.bfloat16
        # One is not held up by another thread that waits for a busy core: the answer stays the same there.
        assert threads == {1} and torch.get_num_threads() == ours
    finally:
        precision.bf16_speedup_on_cpu.cache_clear()


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_a_half_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: has_bf16)
    monkeypatch.setattr(precision, "fails_in", lambda *_: None)
    assert precision.DTYPES[precision.pick_precision("auto", torch.device("cuda", 0))] == dtype


@pytest.mark.parametrize("requested", ["bf16", "fp16", "tf32"])
def test_a_precision_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    give_cpu_instructions(monkeypatch)
    with pytest.raises(UserError, match=f"--compute-dtype {requested}: .* fp32"):
        precision.pick_precision(requested, CPU)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_tf32_is_allowed_to_all_or_to_none() -> None:
    for allow in (True, False):
        precision.set_fp32_precision(allow_tf32=allow)
        assert torch.backends.cudnn.allow_tf32 is allow
        assert torch.backends.cuda.matmul.allow_tf32 is allow


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_so_that_large_tensors_come_without_page_faults() -> None:
    """In a process of its own, since it holds for the whole process: allocate, free, allocate again.

    The heap grows until it holds a gap of the right size: small allocations split the first few.
    """
    code = """
import resource, torch
from fasttrain.system.precision import prepare

def page_faults():
    for _ in range(20):
        torch.zeros(2**26, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = page_faults()
prepare(torch.device("cpu"), "auto")
print(returned, page_faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 10
