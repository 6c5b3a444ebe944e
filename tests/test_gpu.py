"""A GPU that is there and not used is explained: every reason, in a machine made of files and answers."""

from pathlib import Path

import pytest
import torch

from fasttrain.cli import main
from fasttrain.system import gpu

UNIX_KERNEL_MODULE = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Wed Dec  6 15:43:59 UTC 2026
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN_KERNEL_MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@host)\n"
)
NO_GPUS = "No CUDA GPUs are available"


class Machine:
    """A folder that stands for /, and what torch and nvidia-smi say there."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        patch.setattr(gpu, "ROOT", root)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.torch("2.13.0+cu130", "13.0")
        self.nvidia_smi(None)
        self.cuda_error(NO_GPUS)

    def card(self, vendor: str, kind: str = "0x030000") -> None:
        device = self.root / "sys/bus/pci/devices" / f"0000:0{len(list(self.root.rglob('vendor')))}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def driver(self, version: str, banner: str = UNIX_KERNEL_MODULE) -> None:
        folder = self.root / "proc/driver/nvidia"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "version").write_text(banner.format(version))

    def device_file(self, name: str) -> None:
        (self.root / "dev").mkdir(exist_ok=True)
        (self.root / "dev" / name).touch()

    def torch(self, version: str, cuda: str | None) -> None:
        self.patch.setattr(torch, "__version__", version)
        self.patch.setattr(torch.version, "cuda", cuda)

    def nvidia_smi(self, answer: str | None) -> None:
        self.patch.setattr(gpu, "output_of", lambda *_: answer)

    def cuda_error(self, text: str) -> None:
        def init() -> None:
            raise RuntimeError(text)

        self.patch.setattr(torch.cuda, "init", init)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_machine_without_an_nvidia_gpu_is_told_nothing(machine: Machine) -> None:
    assert gpu.why_no_gpu() is None and gpu.other_gpu() is None
    machine.card("0x10de", kind="0x020000")  # a network adapter
    machine.card("0x1a03")  # a server's own display
    assert gpu.why_no_gpu() is None and gpu.other_gpu() is None
    machine.nvidia_smi("NVIDIA-SMI has failed")
    assert gpu.why_no_gpu() is None


@pytest.mark.parametrize(("vendor", "name"), [("0x1002", "AMD"), ("0x8086", "Intel")])
def test_other_gpus_are_named(machine: Machine, vendor: str, name: str) -> None:
    machine.card(vendor)
    assert gpu.why_no_gpu() is None and gpu.other_gpu() == name


def test_apples_gpu_is_named(machine: Machine) -> None:
    machine.patch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert gpu.other_gpu() == "Apple"


def test_a_cpu_build_of_torch(machine: Machine) -> None:
    machine.card("0x10de", kind="0x030200")
    machine.driver("580.65.06")
    machine.torch("2.13.0+cpu", None)
    reason = gpu.why_no_gpu()
    assert reason and "torch 2.13.0+cpu is not built for CUDA: install torch's CUDA build" in reason


def test_no_driver(machine: Machine) -> None:
    machine.card("0x10de")
    reason = gpu.why_no_gpu()
    assert reason and "no driver is loaded: install NVIDIA's, 580 or newer" in reason


@pytest.mark.parametrize("banner", [UNIX_KERNEL_MODULE, OPEN_KERNEL_MODULE])
def test_an_old_driver(machine: Machine, banner: str) -> None:
    machine.driver("570.133.20", banner)
    reason = gpu.why_no_gpu()
    assert reason and "needs driver 580 or newer, and this is 570.133.20: update it, or" in reason
    machine.torch("2.13.0+cu126", "12.6")  # which that driver runs
    reason = gpu.why_no_gpu()
    assert reason and "driver" not in reason


def test_a_driver_that_only_nvidia_smi_knows_of(machine: Machine) -> None:
    """As on WSL, whose GPU is neither on the PCI bus nor under /proc."""
    machine.nvidia_smi("566.36\n566.36")
    reason = gpu.why_no_gpu()
    assert reason and "this is 566.36" in reason
    machine.nvidia_smi("580.97")
    machine.device_file("dxg")
    reason = gpu.why_no_gpu()
    assert reason and "CUDA does not start" in reason


def test_a_container_without_the_gpu(machine: Machine) -> None:
    machine.driver("580.65.06")
    machine.device_file("nvidiactl")
    reason = gpu.why_no_gpu()
    assert reason and "start a container with --gpus all" in reason


def test_a_gpu_that_the_environment_hides(machine: Machine) -> None:
    machine.driver("580.65.06")
    machine.device_file("nvidia0")
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "")
    reason = gpu.why_no_gpu()
    assert reason and "CUDA_VISIBLE_DEVICES='' hides it: unset that variable" in reason
    machine.cuda_error("CUDA unknown error\nthis may be due to an incorrectly set up environment")
    reason = gpu.why_no_gpu()
    assert reason and "(CUDA unknown error this may be" in reason and "restart" in reason


@pytest.mark.parametrize(
    ("architectures", "card", "remedy"),
    [
        (["sm_75", "sm_90"], (7, 5), None),
        (["sm_75", "sm_80", "sm_90"], (8, 9), None),  # sm_80 runs on all of 8.x
        (["sm_90a"], (9, 0), None),
        (["sm_90", "compute_90"], (12, 0), None),
        (["gfx90a", "gfx1100"], (9, 0), None),
        (["sm_75", "sm_100"], (6, 1), "it has 6.1: install torch's build for CUDA 12.6"),
        (["sm_75", "sm_100"], (7, 0), "built for compute capability 7.5, 10.0, and it has 7.0"),
        (["sm_75", "sm_90"], (12, 0), "it has 12.0: install a newer torch"),
    ],
)
def test_a_card_that_torch_has_no_code_for(
    machine: Machine, architectures: list[str], card: tuple[int, int], remedy: str | None
) -> None:
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_arch_list": lambda: architectures,
        "get_device_capability": lambda index: card,
        "get_device_name": lambda index: "NVIDIA Card",
    }
    for name, answer in cuda.items():
        machine.patch.setattr(torch.cuda, name, answer)
    reason = gpu.why_no_gpu()
    assert reason is None if remedy is None else (reason and remedy in reason)
    machine.patch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.patch.setattr(torch.cuda, "get_device_capability", {0: card, 1: (7, 5)}.get)
    machine.patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    assert gpu.why_no_gpu() is None  # the other one can be used


def test_train_says_it_first_and_refuses_with_no_fallback(
    machine: Machine, dataset_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.card("0x10de")
    machine.torch(torch.__version__, None)
    small = ["--epochs", "1", "--batch-size", "32", "--width", "4"]
    command = ["train", "--data-dir", str(dataset_dir), "--out", str(tmp_path / "runs"), *small]
    reason = "the NVIDIA GPU is not used, since torch"
    assert main(command) == 0
    assert reason in capsys.readouterr().out
    assert main([*command, "--no-fallback"]) == 2
    assert reason in capsys.readouterr().err
    assert main([*command, "--device", "cuda"]) == 2
    assert f"--device cuda: {reason}" in capsys.readouterr().err
