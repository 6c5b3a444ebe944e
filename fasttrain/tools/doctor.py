"""`fasttrain doctor`: what works on this machine, and the remedy for everything that is missing."""

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from fasttrain import __version__
from fasttrain.data.build_loader import dali_unusable
from fasttrain.errors import UserError
from fasttrain.system.compiler import compiler_available
from fasttrain.system.files import nearest_existing
from fasttrain.system.gpu import other_gpu, why_no_gpu
from fasttrain.system.machine import GIB, describe, pick_device, version_of
from fasttrain.system.precision import DTYPES, pick_precision
from fasttrain.system.rates import measure_copy_gbps, measure_matmul_tflops

DATA_GIB = 0.5
"""Space for the download (0.16 GiB) and the unpacked images (0.17 GiB), rounded up."""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table. `fix` is empty if all is well."""

    component: str
    state: str
    fix: str = ""
    stops_training: bool = False


def doctor(device: str = "auto") -> int:
    """Print what works on this machine, and the remedy for everything that is missing.

    Returns the exit status: 0 if training can run, 1 if not.
    """
    from rich.table import Table
    from rich.text import Text

    from fasttrain.system.console import Console

    findings = examine(device)
    table = Table("component", "state", "fix")
    for finding in findings:
        colour = "red" if finding.stops_training else "yellow" if finding.fix else "green"
        # Text, since an error message may contain brackets that rich would read as markup.
        table.add_row(finding.component, Text(finding.state, style=colour), Text(finding.fix))
    can_train = not any(finding.stops_training for finding in findings)
    console = Console()
    console.print(table)
    console.print("Training can run here." if can_train else "Training cannot run here yet.")
    return 0 if can_train else 1


def examine(requested_device: str = "auto") -> list[Finding]:
    """Return the doctor's findings, in reading order. Takes about 2 s, most of it to measure peak rates."""
    findings = [
        _examine_package(),
        Finding("Python", platform.python_version()),
        Finding("torch", torch.__version__),
    ]
    try:
        device = pick_device(requested_device)
        findings.append(_examine_device(device))
    except UserError as error:
        device = torch.device("cpu")
        findings.append(Finding("device", f"{requested_device}: not found", str(error), stops_training=True))
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
        _examine_import("pyarrow", "pyarrow"),
    ]
    return findings


def _examine_device(device: torch.device) -> Finding:
    machine = describe(device)
    if device.type == "cuda":
        return Finding("device", f"{device}: {machine['gpu_name']}, driver {machine['gpu_driver']}")
    other = f"; the {vendor} GPU is not used" if device.type == "cpu" and (vendor := other_gpu()) else ""
    state = f"{device}: {machine['cpu_model']}, {machine['cpu_cores']} cores{other}"
    return Finding("device", state, why_no_gpu() or "")


def _examine_package() -> Finding:
    """Examine whether another package, `fasttrain` on PyPI, has put its files into this one's folder."""
    other = version_of("fasttrain")
    if other is None:
        return Finding("fasttrain-dali", __version__)
    state = f"{__version__}, mixed with {other} of `fasttrain`, another package with the same folder"
    fix = "pip uninstall fasttrain fasttrain-dali, then install fasttrain-dali again"
    return Finding("fasttrain-dali", state, fix)


def _examine_memory(device: torch.device) -> Finding:
    machine = describe(device)
    gpu = f", GPU {machine['gpu_memory_gib']} GiB" if device.type == "cuda" else ""
    return Finding("memory", f"{machine['memory_gib']} GiB{gpu}")


def _examine_disk() -> Finding:
    """Examine the space for the images, in FASTTRAIN_DATA or data/, or the nearest parent that exists."""
    folder = Path(os.environ.get("FASTTRAIN_DATA") or "data")
    free_gib = shutil.disk_usage(nearest_existing(folder)).free / GIB
    fix = f"set FASTTRAIN_DATA to a folder with {DATA_GIB} GiB free" if free_gib < DATA_GIB else ""
    return Finding("disk", f"{free_gib:.1f} GiB free at {folder}", fix)


def _examine_dali(device: torch.device) -> Finding:
    """Compare a few of DALI's pixels with the pure-torch loader's, which takes over where they differ."""
    reason = dali_unusable(device)
    if reason is not None:
        return Finding("DALI", "the pure-torch loader is used instead", reason)
    return Finding("DALI", f"{version_of('nvidia-dali-cuda120')}, makes the expected pixels on {device}")


def _examine_import(distribution: str, module: str) -> Finding:
    """Examine a package that one command needs and training does not."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return Finding(distribution, f"missing ({error})", f"pip install {distribution}")
    return Finding(distribution, version_of(distribution) or "works")
