"""Why a GPU that is in the machine is not used, and what to do about it.

torch says no more than that there is none that it can use. What is in the machine is known from the PCI bus,
from what the driver leaves under /proc and /dev, and from nvidia-smi.
"""

import os
import re
from pathlib import Path

import torch

from fasttrain.errors import one_line
from fasttrain.system.command import output_of

ROOT = Path("/")
"""Where /dev, /proc and /sys are."""

LEAST_DRIVER = {"12": 525, "13": 580}
"""The oldest driver that runs a major version of CUDA.

https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
"""

VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""By their numbers on the PCI bus."""

OTHER_BUILD = "install torch's build for CUDA 12.6, as docs/install.md says"


def why_no_gpu() -> str | None:
    """Return why no NVIDIA GPU can be used although there is one, and the remedy, in one line.

    None if one can be used, or if there is none.
    """
    if torch.cuda.is_available():
        reasons = [why_unsupported(index) for index in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]
    driver = _driver_version()
    if driver is None and "NVIDIA" not in _vendors():
        return None
    return f"the NVIDIA GPU is not used, since {_why_unavailable(driver)}"


def _why_unavailable(driver: str | None) -> str:
    """driver: the version of the one that is loaded."""
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{build} is not built for CUDA: install torch's CUDA build, as docs/install.md says"
    least = LEAST_DRIVER.get(torch.version.cuda.split(".")[0], 0)
    if driver is None:
        return f"no driver is loaded: install NVIDIA's, {least} or newer"
    if int(driver.split(".")[0]) < least:
        return f"{build} needs driver {least} or newer, and this is {driver}: update it, or {OTHER_BUILD}"
    device_files = [*(ROOT / "dev").glob("nvidia[0-9]*"), *(ROOT / "dev").glob("dxg")]  # the latter is WSL's
    if not device_files:
        return "/dev has no nvidia0: start a container with --gpus all; on the machine itself, run nvidia-smi"
    error = _cuda_error()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "No CUDA GPUs" in error:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it: unset that variable"
    return f"CUDA does not start ({error}): if nvidia-smi fails too, restart the machine"


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return one_line(error)
    return "no error"


def why_unsupported(index: int) -> str | None:
    """Return why torch's build has no code for this NVIDIA GPU, and the remedy, in one line; None if it has.

    Code for sm_XY runs on the later cards of the same X; compute_XY is compiled for any later card.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list()]
    built = [(match[1], (int(match[2]), int(match[3]))) for match in found if match]
    card = torch.cuda.get_device_capability(index)
    runs = [version <= card and (kind == "compute" or version[0] == card[0]) for kind, version in built]
    if any(runs) or not built:  # AMD's builds name none of these
        return None
    versions = ", ".join(f"{major}.{minor}" for major, minor in sorted({version for _, version in built}))
    remedy = OTHER_BUILD if all(card < version for _, version in built) else "install a newer torch"
    return (
        f"the {torch.cuda.get_device_name(index)} is not used, since torch {torch.__version__} is built for "
        f"compute capability {versions}, and it has {card[0]}.{card[1]}: {remedy}"
    )


def other_gpu() -> str | None:
    """Return the vendor of a GPU that fasttrain does not take by itself: Apple, AMD or Intel; or None."""
    if torch.backends.mps.is_available():
        return "Apple"
    return next((vendor for vendor in _vendors() if vendor != "NVIDIA"), None)


def _driver_version() -> str | None:
    """Return the version of the NVIDIA driver that is loaded, or None."""
    path = ROOT / "proc/driver/nvidia/version"
    text = path.read_text() if path.exists() else ""
    if loaded := re.search(r"Module.*?\s(\d+\.[\d.]+)\s", text):
        return loaded[1]
    told = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # on WSL
    asked = re.match(r"\d+\.[\d.]+", told or "")
    return asked[0] if asked else None


def _vendors() -> list[str]:
    """Return the vendors of the display controllers (class 0x03) on the PCI bus."""
    devices = sorted((ROOT / "sys/bus/pci/devices").glob("*"))
    cards = [device for device in devices if (device / "class").read_text().startswith("0x03")]
    numbers = [(card / "vendor").read_text().strip() for card in cards]
    return [VENDORS[number] for number in numbers if number in VENDORS]
