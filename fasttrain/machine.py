"""What this machine is and what it can do: device, precision, compiler, versions, measured peak rates.

`fasttrain doctor` prints it as a table, with the remedy beside whatever is missing. A run's `machine.json` is
`describe(device)`: a speed means nothing without the machine it was measured on.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.errors import UserError

GIB = 2**30
BF16_PAYS_FROM = 0.8
"""Bf16's rate in float32's from which a CPU's step takes bf16: all else in it moves half of the bytes."""
EMULATED_TFLOPS = 0.01
"""A CPU's rate below which it emulates the products; a single core has more in float32."""
DATA_GIB = 0.5
"""Room that the download (0.16 GiB) and the unpacked images (0.17 GiB) need, rounded up."""


# ------------------------------------------------------------------------------------- device and precision


def pick_device(requested: str = "auto") -> torch.device:
    """The device to train on: auto takes the first NVIDIA GPU, and the CPU where there is none.

    Apple's mps is taken on request only. Raises UserError if the requested device is not there.
    """
    cuda_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        requested = "cuda" if cuda_count else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")  # No device of ours either: refused below.
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) < cuda_count:
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    known = ["auto", "cpu", *(f"cuda:{index}" for index in range(cuda_count))]
    if torch.backends.mps.is_available():
        known.append("mps")
    raise UserError(f"--device {requested}: not on this machine; expected one of {', '.join(known)}")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; emulated bf16 is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # oneDNN does the fast bf16 products. Its own check also says yes to AVX-512 without bf16, which it
        # emulates, so ask for the instructions: x86's two extensions, then Arm's.
        instructions = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and any(
            instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")
        )
    return False


@functools.cache
def bf16_speedup_on_cpu() -> float:
    """How many times as fast the CPU multiplies matrices in bf16 as in float32; a tenth of a second, once.

    On one thread: several wait for each other, which hides the difference where other work shares the cores.
    """
    device, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {
            dtype: measure_matmul_tflops(device, dtype, seconds=0.05, side=512)
            for dtype in (torch.float32, torch.bfloat16)
        }
    finally:
        torch.set_num_threads(threads)
    return rates[torch.bfloat16] / rates[torch.float32]


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""Of the matrix products, by precision; `set_fp32_precision(True)` makes tf32 of float32."""


def pick_precision(requested: str, device: torch.device) -> str:
    """The precision of the matrix products: bf16, fp16, fp32 or tf32.

    auto takes the fastest that the hardware has. On a CPU a short measurement tells it: of processors with
    bf16 products some have them at twice float32's rate and more, others at half (benchmarks/LOG.md).
    Raises UserError for a precision that this device lacks, emulated ones included.
    """
    if requested == "auto":
        if device.type == "cuda":
            return "bf16" if has_native_bf16(device) else "fp16"
        pays = has_native_bf16(device) and bf16_speedup_on_cpu() > BF16_PAYS_FROM
        return "bf16" if pays else "fp32"
    if requested == "bf16" and not has_native_bf16(device):
        raise UserError(f"--compute-dtype bf16: {device} has no bf16 arithmetic; use auto or fp32")
    if requested == "fp16" and device.type == "cpu":
        # It runs, but a convolution's training step took 10 times as long as in float32 (torch 2.13, Zen 4).
        raise UserError("--compute-dtype fp16: slower than fp32 on a CPU; use auto or fp32")
    if requested == "tf32" and device.type != "cuda":
        raise UserError(f"--compute-dtype tf32: only on an NVIDIA GPU, not on {device}; use auto or fp32")
    return requested


def pick_compute_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of what pick_precision picks."""
    return DTYPES[pick_precision(requested, device)]


def evaluation_precision(trained: str | None, device: torch.device) -> str:
    """The precision to evaluate a network in: the training's where this device has it, else auto's."""
    try:
        return pick_precision(trained or "auto", device)
    except UserError:
        return pick_precision("auto", device)


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Leave torch's global random generators, the CPU's and the device's, as they were before the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def set_fp32_precision(allow_tf32: bool) -> None:
    """Let float32 matmuls and convolutions round their inputs to TF32, or forbid it to both.

    torch's own defaults disagree with each other: convolutions may, matmuls may not.
    """
    # Clear the newer settings, which may contradict the older two switches below. Those are set on purpose:
    # torch's own inductor (2.13) still reads them, and torch refuses that where a newer setting disagrees.
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]  # torch's stubs lack it
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within the block float32 products are rounded to float32, and no kernel is chosen by timing it.

    On a CPU torch's own kernels compute: oneDNN's obey ONEDNN_DEFAULT_FPMATH_MODE, which may ask for bf16.
    """
    benchmark, onednn = torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the newer settings disagree with these: float32 stays exact after the block
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
    """Set what holds for the whole process before it computes on this device.

    compute_dtype: as in a recipe, or a precision.
    """
    set_fp32_precision(allow_tf32=compute_dtype == "tf32")
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN time its kernels once
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees; returns whether it does, False on other systems.

    By itself it takes every large tensor from the kernel, which zeroes it page by page, and gives it back at
    once: a quarter of a training step of 512 images (benchmarks/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # their numbers in glibc's malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def compiler_available(device: torch.device) -> str | None:
    """None if torch.compile can work on this device, else the reason and the remedy in one line."""
    # Imported here: they take a second, and only a few commands ask.
    from torch._dynamo import is_dynamo_supported
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if not is_dynamo_supported():
        return f"torch {torch.__version__} cannot compile on Python {platform.python_version()}"
    if device.type == "cuda":
        if not has_triton():
            return "no Triton for this GPU: pip install triton (needs compute capability 7.0)"
        # Triton compiles a small C launcher for every kernel.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler: install gcc, or set CC"
    elif device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler: install g++, or set CXX"
    else:
        return f"fasttrain does not compile for {device.type}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h: install Python's development files (python3-dev)"
    return None


# ---------------------------------------------------------------------------------------------- peak rates


def measure_matmul_tflops(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.5, side: int | None = None
) -> float:
    """The best rate of a large square matrix product, in TFLOP/s: the peak that MFU is a share of.

    side: rows and columns of the matrices; by default 8,192 on a GPU and 2,048 on a CPU, or 512 on a CPU that
    emulates the dtype, which would need many seconds for a single product of 2,048.
    float32 runs at whatever `set_fp32_precision` has allowed. Syncs with the device.
    """
    if side is None and device.type == "cpu":
        side = 512 if measure_matmul_tflops(device, dtype, 0.0, side=512) < EMULATED_TFLOPS else 2048
    side = side or 8192
    noise = torch.Generator(device)  # torch's global one is the caller's
    left, right = (torch.randn(side, side, generator=noise, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    best_seconds = _best_seconds(lambda: torch.mm(left, right, out=product), device, seconds)
    return 2 * side**3 / best_seconds / 1e12


def measure_copy_gbps(device: torch.device, seconds: float = 0.5) -> float:
    """The best rate of a copy within the device's memory, in GB/s, counting reads and writes.

    Its 256 MiB buffers exceed the last-level cache of all but the largest CPUs. Syncs with the device.
    """
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best_seconds = _best_seconds(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() / best_seconds / 1e9


def _best_seconds(work: Callable[[], object], device: torch.device, budget_seconds: float) -> float:
    """Seconds of one call of work: the best burst within the budget, after a warm-up."""
    on_cpu = device.type == "cpu"
    calls = 1 if on_cpu else 10  # A burst of ten hides the cost of launching and of waiting.

    def burst() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if not on_cpu:
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / calls

    burst()
    deadline = time.perf_counter() + budget_seconds
    best = burst()
    while time.perf_counter() < deadline:
        best = min(best, burst())
    return best


# ------------------------------------------------------------------------------------------ what it is


def describe(device: torch.device) -> dict[str, object]:
    """The machine and its software, ready for JSON. Holds no host name, user name or path.

    What cannot be found out is None. The gpu_ keys are there on an NVIDIA GPU only.
    """
    commit, is_dirty = _source_revision()
    machine: dict[str, object] = {
        "fasttrain": __version__,
        "git_commit": commit,
        "git_dirty": is_dirty,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dali": _version("nvidia-dali-cuda120"),
        "numpy": _version("numpy"),
        "device": str(device),
        "cpu_model": _cpu_model(),
        "cpu_cores": cpu_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        # By its UUID: nvidia-smi counts all GPUs, torch only those that CUDA_VISIBLE_DEVICES shows it.
        query = ("nvidia-smi", f"--id=GPU-{gpu.uuid}", "--format=csv,noheader,nounits")
        driver, _, watts = (_output(*query, "--query-gpu=driver_version,power.limit") or "").partition(", ")
        machine |= {
            "gpu_name": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / GIB, 1),
            "gpu_driver": driver or None,
            "gpu_power_limit_watts": float(watts) if watts.replace(".", "").isdigit() else None,
        }
    return machine


def hardware_name(machine: dict[str, Any]) -> str:
    """What `describe` gave, in a few words: the GPU, or the CPU with the cores used; and the ranks."""
    ranks = f", {machine['ranks']} ranks" if machine.get("ranks", 1) > 1 else ""
    if machine.get("gpu_name"):
        return f"{machine['gpu_name']}{ranks}"
    return f"{machine.get('cpu_cores')} cores of {machine.get('cpu_model')}{ranks}"


def cpu_cores() -> int:
    """Logical cores that this process may use: taskset and containers allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # Arm's cpuinfo has no such line.
                return line.partition(":")[2].strip()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_revision() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package lies in, and whether its sources were changed since.

    Of a copy without its .git, FASTTRAIN_COMMIT tells the commit: output of git describe --always --abbrev=40
    --dirty where it was copied.
    """
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():  # A copy; or installed, perhaps within someone else's repository.
        told = os.environ.get("FASTTRAIN_COMMIT")
        return (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)
    git = ("git", "-C", str(checkout))
    commit = _output(*git, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    # What benchmarks write is no source: the first of several would make all the others look changed.
    paths = ("--", ".", ":!benchmarks/results")
    changes = _output(*git, "status", "--porcelain", "--untracked-files=no", *paths)
    return commit, None if changes is None else bool(changes)


def _output(*command: str) -> str | None:
    """What the command prints, or None if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------- doctor


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table. `fix` is empty where all is well."""

    component: str
    state: str
    fix: str = ""
    stops_training: bool = False


def doctor(device: str = "auto") -> int:
    """Print what this machine can do, with the remedy for whatever is missing.

    Returns the exit status: 0 if training can run, 1 if not.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = examine(device)
    table = Table("component", "state", "fix")
    for finding in findings:
        colour = "red" if finding.stops_training else "yellow" if finding.fix else "green"
        # Text, since an error message may hold brackets that rich would read as markup.
        table.add_row(finding.component, Text(finding.state, style=colour), Text(finding.fix))
    can_train = not any(finding.stops_training for finding in findings)
    console = Console()
    console.print(table)
    console.print("Training can run here." if can_train else "Training cannot run here yet.")
    return 0 if can_train else 1


def examine(requested_device: str = "auto") -> list[Finding]:
    """The doctor's findings, in reading order. Takes about two seconds, most of them for the peak rates."""
    findings = [
        Finding("Python", platform.python_version()),
        Finding("torch", torch.__version__),
    ]
    try:
        device = pick_device(requested_device)
        findings.append(_examine_device(device))
    except UserError as error:
        device = torch.device("cpu")
        findings.append(Finding("device", f"{requested_device}: not there", str(error), stops_training=True))
    precision = pick_precision("auto", device)
    compiler_fix = compiler_available(device)
    findings += [
        Finding("precision", precision),
        Finding("torch.compile", "missing" if compiler_fix else "works", compiler_fix or ""),
        Finding("matmul rate", f"{measure_matmul_tflops(device, DTYPES[precision]):.3g} TFLOP/s"),
        Finding("memory copy", f"{measure_copy_gbps(device):.3g} GB/s"),
        _examine_memory(device),
        _examine_disk(),
        _examine_dali(device),
        _examine_import("torch-lr-finder", "torch_lr_finder"),
        _examine_import("torchinfo", "torchinfo"),
    ]
    return findings


def _examine_device(device: torch.device) -> Finding:
    machine = describe(device)
    if device.type == "cuda":
        return Finding("device", f"{device}: {machine['gpu_name']}, driver {machine['gpu_driver']}")
    state = f"{device}: {machine['cpu_model']}, {machine['cpu_cores']} cores"
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return Finding("device", state)
    if torch.version.cuda is None:
        fix = f"a GPU is here, but torch {torch.__version__} is a CPU build: install torch's CUDA build"
    else:
        fix = f"a GPU is here, but torch cannot use it: update its driver for CUDA {torch.version.cuda}"
    return Finding("device", state, fix)


def _examine_memory(device: torch.device) -> Finding:
    machine = describe(device)
    gpu = f", GPU {machine['gpu_memory_gib']} GiB" if device.type == "cuda" else ""
    return Finding("memory", f"{machine['memory_gib']} GiB{gpu}")


def _examine_disk() -> Finding:
    """Room for the images: in FASTTRAIN_DATA, else in data/, or in the nearest folder above that exists."""
    folder = Path(os.environ.get("FASTTRAIN_DATA") or "data")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    fix = f"set FASTTRAIN_DATA to a folder with {DATA_GIB} GiB free" if free_gib < DATA_GIB else ""
    return Finding("disk", f"{free_gib:.1f} GiB free at {folder}", fix)


def _examine_dali(device: torch.device) -> Finding:
    """Run a DALI pipeline of one operator. Without DALI the pure-torch loader does its work."""
    try:
        from nvidia.dali import fn, pipeline_def
    except (ImportError, OSError) as error:
        if platform.system() != "Linux":
            return Finding("DALI", "not made for this system: the tensor loader stands in")
        fix = "pip install nvidia-dali-cuda120"
        return Finding("DALI", f"missing ({error}): the tensor loader stands in", fix)

    on_gpu = device.type == "cuda"

    backend = "GPU" if on_gpu else "CPU"

    @pipeline_def
    def one_operator() -> Any:
        return fn.random.coin_flip(device=backend.lower())

    try:
        one_operator(batch_size=1, num_threads=1, device_id=device.index if on_gpu else None).run()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        fix = "use --loader tensor" + (", or update the driver to 525 or newer" if on_gpu else "")
        return Finding("DALI", f"its {backend} backend fails: {reason}", fix, stops_training=True)
    return Finding("DALI", f"{_version('nvidia-dali-cuda120')}, its {backend} backend works")


def _examine_import(distribution: str, module: str) -> Finding:
    """A package that one command needs and training does not."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return Finding(distribution, f"missing ({error})", f"pip install {distribution}")
    return Finding(distribution, _version(distribution) or "works")
