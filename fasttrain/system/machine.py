"""The device to use, and a description of the machine and its software.

A run's `machine.json` begins with `describe(device)`: a speed means nothing without its machine.
"""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.errors import UserError
from fasttrain.system.command import output_of
from fasttrain.system.gpu import why_no_gpu, why_unsupported
from fasttrain.system.revision import source_revision

GIB = 2**30


def pick_device(requested: str = "auto") -> torch.device:
    """Choose the device to train on: auto takes the first NVIDIA GPU that torch can use, else the CPU.

    Apple's mps is used only on request. Raises UserError if this machine does not have the requested device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [index for index in range(count) if why_unsupported(index) is None]
    if requested == "auto":
        requested = f"cuda:{gpus[0]}" if gpus else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        device = torch.device("meta")  # not one of ours: refused below
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) in gpus:
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    known = ["auto", "cpu", *(f"cuda:{index}" for index in gpus)]
    if torch.backends.mps.is_available():
        known.append("mps")
    reason = (why_no_gpu() if device.type == "cuda" else None) or "not on this machine"
    raise UserError(f"--device {requested}: {reason}; expected one of {', '.join(known)}")


def describe(device: torch.device) -> dict[str, object]:
    """Describe the machine and its software, ready for JSON, without host name, user name or paths.

    Values that cannot be found out are None. The gpu_ keys exist only on an NVIDIA GPU.
    """
    commit, is_dirty = source_revision()
    machine: dict[str, object] = {
        "fasttrain": __version__,
        "git_commit": commit,
        "git_dirty": is_dirty,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dali": version_of("nvidia-dali-cuda120"),
        "numpy": version_of("numpy"),
        "device": str(device),
        "cpu_model": _cpu_model(),
        "cpu_cores": cpu_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        # By UUID: nvidia-smi counts all GPUs, torch only those in CUDA_VISIBLE_DEVICES.
        query = ("nvidia-smi", f"--id=GPU-{gpu.uuid}", "--format=csv,noheader,nounits")
        driver, _, watts = (output_of(*query, "--query-gpu=driver_version,power.limit") or "").partition(", ")
        machine |= {
            "gpu_name": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / GIB, 1),
            "gpu_driver": driver or None,
            "gpu_power_limit_watts": float(watts) if watts.replace(".", "").isdigit() else None,
        }
    return machine


def hardware_name(machine: dict[str, Any]) -> str:
    """Name a machine that `describe` returned, in a few words: GPU, or CPU and cores used; and ranks."""
    ranks = f", {machine['ranks']} ranks" if machine.get("ranks", 1) > 1 else ""
    if machine.get("gpu_name"):
        return f"{machine['gpu_name']}{ranks}"
    cores = machine.get("cpu_cores")
    return f"{cores} core{'' if cores == 1 else 's'} of {machine.get('cpu_model')}{ranks}"


def cpu_cores() -> int:
    """Count the logical cores that this process may use; taskset and containers can allow fewer than all."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # Arm's cpuinfo has no such line
                return line.partition(":")[2].strip()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or None


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
