import sys

import pytest

from fasttrain.data.build_loader import dali_unusable
from fasttrain.tools import doctor


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
    monkeypatch.setattr(doctor, "dali_unusable", dali_unusable.__wrapped__)  # not what it found before
    monkeypatch.setenv("COLUMNS", "300")
    assert doctor.doctor("cpu") == 0, "training goes on without it"
    assert fix in capsys.readouterr().out


@pytest.mark.usefixtures("quick_rates")
def test_doctor_fails_where_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor("cuda:99") == 1
    assert "cannot run" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_rates")
def test_doctor_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: "the NVIDIA GPU is not used, since no driver is loaded")
    monkeypatch.setattr(doctor, "other_gpu", lambda: "AMD")
    [found] = [finding for finding in doctor.examine("cpu") if finding.component == "device"]
    assert "no driver is loaded" in found.fix and found.state.endswith("the AMD GPU is not used")
    assert not found.stops_training


def test_doctor_warns_of_the_other_package_that_is_called_fasttrain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", {"fasttrain": "0.0.7"}.get)
    found = doctor._examine_package()
    assert "0.0.7" in found.state and "pip uninstall fasttrain fasttrain-dali" in found.fix
    monkeypatch.setattr(doctor, "version_of", {}.get)
    assert doctor._examine_package().fix == ""
