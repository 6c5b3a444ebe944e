"""The machine is described as it is: what is not there is refused or named, never guessed."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from fasttrain.errors import UserError
from fasttrain.system import compiler, machine, precision, rates, rng
from fasttrain.tools import doctor

CPU = torch.device("cpu")


def give_cpu_instructions(monkeypatch: pytest.MonkeyPatch, **instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.mark.parametrize("requested", ["cuda:99", "tpu", "xpu", "meta", ""])
def test_a_device_that_is_not_there_is_refused(requested: str) -> None:
    with pytest.raises(UserError, match="expected one of auto, cpu"):
        machine.pick_device(requested)


def test_auto_takes_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == CPU
    with pytest.raises(UserError, match="--device cuda"):
        machine.pick_device("cuda")


def test_a_gpu_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.pick_device("auto") == machine.pick_device("cuda") == torch.device("cuda", 0)
    assert machine.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:0, cuda:1"):
        machine.pick_device("cuda:2")


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
    assert precision.pick_compute_dtype("auto", CPU) == dtype


def test_auto_leaves_bf16_where_the_cpu_is_slower_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    give_cpu_instructions(monkeypatch, avx512_bf16=True)
    measured, threads, ours = {torch.float32: 0.28, torch.bfloat16: 0.16}, set(), torch.get_num_threads()

    def measure(device: torch.device, dtype: torch.dtype, **_: object) -> float:
        threads.add(torch.get_num_threads())
        return measured[dtype]

    monkeypatch.setattr(precision, "measure_matmul_tflops", measure)
    precision.bf16_speedup_on_cpu.cache_clear()
    try:
        assert precision.pick_compute_dtype("auto", CPU) == torch.float32
        assert precision.pick_compute_dtype("bf16", CPU) == torch.bfloat16  # who asks for it gets it
        # One is not held up by another thread that waits for a busy core: the answer stays the same there.
        assert threads == {1} and torch.get_num_threads() == ours
    finally:
        precision.bf16_speedup_on_cpu.cache_clear()


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_a_half_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: has_bf16)
    assert precision.pick_compute_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("requested", ["bf16", "fp16", "tf32"])
def test_a_precision_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    give_cpu_instructions(monkeypatch)
    with pytest.raises(UserError, match=f"--compute-dtype {requested}: .* fp32"):
        precision.pick_compute_dtype(requested, CPU)  # type: ignore[arg-type]


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
import resource, sys, torch
from fasttrain.system.precision import prepare
if sys.argv[1] == "keep":
    prepare(torch.device("cpu"), "auto")
for _ in range(20):
    torch.zeros(2**26, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True).stdout)
        for mode in ("keep", "return")
    }
    assert faults["keep"] < faults["return"] / 10


def test_a_missing_compiler_is_named_with_its_remedy() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "install g++" in (compiler.compiler_available(CPU) or "")


def test_fork_rng_puts_the_generators_back() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with rng.fork_rng(CPU):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_describe_is_json_and_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(machine.describe(CPU))
    assert json.loads(text)["torch"] == torch.__version__
    assert platform.node() not in text
    assert str(machine.Path.home()) not in text


@pytest.mark.parametrize(
    ("told", "commit", "dirty"), [("0123abc", "0123abc", False), ("0123abc-dirty", "0123abc", True)]
)
def test_a_copy_without_git_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, commit: str, dirty: bool
) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "fasttrain" / "system" / "machine.py"))
    monkeypatch.delenv("FASTTRAIN_COMMIT", raising=False)
    assert machine.describe(CPU)["git_commit"] is None
    monkeypatch.setenv("FASTTRAIN_COMMIT", told)
    assert (machine.describe(CPU)["git_commit"], machine.describe(CPU)["git_dirty"]) == (commit, dirty)


def test_rates_are_positive() -> None:
    before = torch.get_rng_state()
    assert rates.measure_matmul_tflops(CPU, torch.float32, seconds=0.05) > 0
    assert torch.equal(torch.get_rng_state(), before)  # what a caller draws does not hang on it
    assert rates.measure_copy_gbps(CPU, seconds=0.05) > 0


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_matmul_tflops", lambda *_, **__: 1.0)
    monkeypatch.setattr(doctor, "measure_copy_gbps", lambda device: 1.0)


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("torchinfo", "pip install torchinfo"),
        ("torch_lr_finder", "pip install torch-lr-finder"),
        pytest.param(
            "nvidia.dali",
            "pip install nvidia-dali-cuda120",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="DALI is made for Linux"),
        ),
    ],
)
def test_doctor_names_a_missing_package_and_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, fix: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Makes `import module` fail.
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.doctor("cpu") == 0, "training goes on without it"
    assert fix in capsys.readouterr().out


@pytest.mark.usefixtures("quick_rates")
def test_doctor_fails_where_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor("cuda:99") == 1
    assert "cannot run" in capsys.readouterr().out


@pytest.mark.gpu
def test_describe_on_a_gpu() -> None:
    described = machine.describe(torch.device("cuda", 0))
    json.dumps(described)
    assert described["gpu_name"] and described["gpu_driver"]


@pytest.mark.gpu
def test_compute_on_a_gpu() -> None:
    device = machine.pick_device("auto")
    assert device.type == "cuda"
    assert rates.measure_matmul_tflops(device, precision.pick_compute_dtype("auto", device)) > 1


@pytest.mark.parametrize(("seconds", "side"), [(1e-3, 2048), (1.0, 512)])
def test_a_cpu_that_emulates_a_precision_is_measured_with_smaller_matrices(
    seconds: float, side: int, monkeypatch
) -> None:
    """At a second for a product of 512, one of 2,048 would take a minute."""
    monkeypatch.setattr(rates, "_best_seconds", lambda *_: seconds)
    assert rates.measure_matmul_tflops(CPU, torch.float32) == 2 * side**3 / seconds / 1e12
