"""The precision of the matrix products: what the hardware supports, which to use, and torch's settings."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from fasttrain.errors import UserError, one_line
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.memory import keep_freed_memory
from fasttrain.system.rates import measure_matmul_tflops

BF16_PAYS_FROM = 0.8
"""Rate of bf16 products on a CPU, as a multiple of float32's, above which training in bf16 pays.

Below 1, because everything else in a step moves half as many bytes.
"""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""The dtype of each precision; `set_fp32_precision(True)` turns float32 products into tf32."""


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the hardware itself multiplies in bf16; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # oneDNN computes the fast bf16 products. Its own check also accepts AVX-512 without bf16, where it
        # emulates them; so look for the instructions: x86's two extensions, then Arm's.
        instructions = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and any(
            instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")
        )
    return False


@functools.cache
def bf16_speedup_on_cpu() -> float:
    """Measure how many times as fast the CPU multiplies matrices in bf16 as in float32. Takes 50 ms, once.

    Uses one thread: several wait for each other, which hides the difference when the cores are shared.
    """
    device, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {
            dtype: measure_matmul_tflops(device, dtype, seconds=0.02, side=512)
            for dtype in (torch.float32, torch.bfloat16)
        }
    finally:
        torch.set_num_threads(threads)
    return rates[torch.bfloat16] / rates[torch.float32]


def pick_precision(requested: str, device: torch.device, fallbacks: Fallbacks | None = None) -> str:
    """Choose the precision of the matrix products: bf16, fp16, fp32 or tf32.

    auto takes the fastest that the hardware has and that works. On a CPU a short measurement decides: some
    processors compute bf16 products at more than twice float32's rate, others at half of it
    (docs/lab-notebook.md).
    fallbacks: called for each precision that fails; by default it prints a line. Raises UserError for a
    requested precision that this device lacks, only emulates, or fails in.
    """
    if requested == "auto":
        return _pick_automatically(device, fallbacks or Fallbacks())
    if requested == "bf16" and not has_native_bf16(device):
        raise UserError(f"--compute-dtype bf16: {device} has no bf16 arithmetic; use auto or fp32")
    if requested == "fp16" and device.type == "cpu":
        # It works, but training a convolution took 10 times as long as in float32 (torch 2.13, Zen 4).
        raise UserError("--compute-dtype fp16: slower than fp32 on a CPU; use auto or fp32")
    if requested == "tf32" and device.type != "cuda":
        raise UserError(f"--compute-dtype tf32: only on an NVIDIA GPU, not on {device}; use auto or fp32")
    failure = None if requested == "fp32" else fails_in(requested, device)
    if failure is not None:
        raise UserError(f"--compute-dtype {requested}: {failure}; use auto or fp32")
    return requested


def _pick_automatically(device: torch.device, fallbacks: Fallbacks) -> str:
    wanted: list[str] = []
    if device.type == "cuda":
        wanted = ["bf16"] * has_native_bf16(device) + ["fp16"]
    elif has_native_bf16(device) and bf16_speedup_on_cpu() > BF16_PAYS_FROM:
        wanted = ["bf16"]
    for precision, next_best in zip(wanted, [*wanted[1:], "fp32"], strict=False):
        failure = fails_in(precision, device)
        if failure is None:
            return precision
        fallbacks(f"precision: {failure}", f"computing in {next_best}, which may be slower")
    return "fp32"


@functools.cache
def fails_in(precision: str, device: torch.device) -> str | None:
    """Try a convolution and its gradients in this precision; returns None, or what went wrong, in a line."""
    images_NCHW = torch.ones(2, 8, 8, 8, device=device).to(memory_format=torch.channels_last)
    filters_FCHW = torch.full((8, 8, 3, 3), 1 / 72, device=device, requires_grad=True)
    try:
        with autocast(device, DTYPES[precision]):
            product_NCHW = functional.conv2d(images_NCHW, filters_FCHW, padding=1)
        product_NCHW.float().mean().backward()
        # Away from the border every product is a mean of ones.
        worst = (product_NCHW[:, :, 1:-1, 1:-1].float() - 1).abs().max().item()
    except RuntimeError as error:
        return f"{precision} fails on {device} ({one_line(error)})"
    exact = worst < 0.02 and filters_FCHW.grad is not None and bool(filters_FCHW.grad.isfinite().all())
    return None if exact else f"a convolution in {precision} gives wrong values on {device}"


def evaluation_precision(trained: str | None, device: torch.device) -> str:
    """Choose the precision for an evaluation: that of the training if it works here, else auto's."""
    silent = Fallbacks(lambda _: None)
    try:
        return pick_precision(trained or "auto", device, silent)
    except UserError:
        return pick_precision("auto", device, silent)


def set_fp32_precision(allow_tf32: bool) -> None:
    """Allow or forbid float32 matmuls and convolutions to round their inputs to TF32.

    torch's defaults are inconsistent: they allow it for convolutions and forbid it for matmuls.
    """
    # Clear the newer settings, which may contradict the two older ones below. The older ones are set on
    # purpose: torch's inductor (2.13) still reads them, and torch raises if a newer setting disagrees.
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # torch's stubs lack it
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block, float32 products are exact to float32, and no kernel is chosen by timing it.

    On a CPU, torch's own kernels compute: oneDNN's obey ONEDNN_DEFAULT_FPMATH_MODE, which may ask for bf16.
    """
    benchmark, onednn = torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the newer settings disagree with these two: float32 stays exact after the block
        before = None
    set_fp32_precision(allow_tf32=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch's stubs take it for a ContextProp
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled = benchmark, onednn
        if before is not None:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def prepare(device: torch.device, compute_dtype: str) -> None:
    """Apply the process-wide settings for computing on this device.

    compute_dtype: a recipe's compute_dtype, or a precision.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
    set_fp32_precision(allow_tf32=compute_dtype == "tf32")
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN time its kernels once
    if device.type == "cpu":
        keep_freed_memory()


def autocast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Return a context that autocasts to the compute dtype; it does nothing for float32."""
    enabled = compute_dtype != torch.float32
    return torch.autocast(device.type, dtype=compute_dtype if enabled else None, enabled=enabled)
