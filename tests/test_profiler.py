"""The profiler's window, its files, and what it says about them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from fasttrain.cli import main
from fasttrain.tools import profiler
from fasttrain.tools.profiler import MATRIX, REST, STEP, WAIT, Profile, sentences

FOUND = Profile(
    device="cuda",
    precision="bf16",
    loader="dali",
    compile="default",
    batch_size=512,
    steps=20,
    step_ms=4.0,
    wait_share=0.01,
    idle_share=0.05,
    group_shares={MATRIX: 0.7, "normalisation": 0.2, REST: 0.1},
    matmul_tflops_measured=600.0,
    matrix_ms=2.0,
)


def said(**changes: object) -> str:
    lines = sentences(dataclasses.replace(FOUND, **changes))
    assert len(lines) == 3 and all(line.endswith(".") for line in lines)
    return " ".join(lines)


def test_the_sentences_name_the_bound_the_distance_and_a_remedy() -> None:
    assert "Arithmetic" in said() and "at 50% of that rate" in said() and "normalisation" in said()
    loader = said(wait_share=0.5)
    assert "loader bounds" in loader and "2.0." in loader and "--loader-threads" in loader
    idle = said(idle_share=0.25)
    assert "GPU is idle 25%" in idle and "3.0." in idle and "one launch" in idle
    assert "only 60% of the time" in said(idle_share=0.4, device="cpu")
    assert "Memory traffic" in said(group_shares={MATRIX: 0.3, "pooling": 0.6, REST: 0.1})
    assert "half precision" in said(precision="fp32")
    assert "--compile default" in said(compile="off") and "--compile" not in said(compile="off", device="cpu")
    assert "shorter schedule" in said(matrix_ms=3.6)


def test_a_profile_leaves_a_trace_a_table_and_figures_of_the_steps_that_count(
    dataset_dir: Path, tmp_path: Path, capsys
) -> None:
    options = [
        "--data-dir",
        str(dataset_dir),
        "--device",
        "cpu",
        "--batch-size",
        "8",
        "--out",
        str(tmp_path / "p"),
    ]
    assert main(["profile", "--recipe", "laptop", "--active", "2", "--operators", "5", *options]) == 0
    out = capsys.readouterr().out
    assert "convolution" in out and "trace.json" in out
    assert (
        "bounds this training" in out or "The cores work for this training" in out
    )  # where others have them
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert found["steps"] == 2 and found["batch_size"] == 8 and found["machine"]["torch"] == torch.__version__
    assert 0 <= found["wait_share"] < 1 and 0 <= found["idle_share"] < 1
    assert sum(found["group_shares"].values()) == pytest.approx(1) and found["group_shares"][MATRIX] > 0.2
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count(STEP) == names.count(WAIT) == 2
    assert "[memory]" in names  # memory over time
    assert "aten::mkldnn_convolution" in names or "aten::convolution" in names
    assert "conv" in (tmp_path / "p" / "operators.txt").read_text()


@pytest.mark.parametrize(("flag", "value"), [("--active", "0"), ("--warmup", "0"), ("--wait", "-1")])
def test_impossible_windows_are_refused_by_name(flag: str, value: str, capsys) -> None:
    assert main(["profile", "--data", "synthetic", flag, value]) == 2
    assert f"{flag} {value}: expected at least" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(dataset_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    options = ["--data-dir", str(dataset_dir), "--device", "cpu", "--batch-size", "8", "--active", "1"]
    assert main(["profile", *options, "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fasttrain profile: --out") and error.count("\n") == 1


def test_a_named_range_is_no_kernel_whoever_named_it() -> None:
    """torch lists every range among the GPU's kernels, from the start of its first to the end of its last."""

    def event(name: str, start: float, end: float, is_user_annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            key=name,
            time_range=SimpleNamespace(start=start, end=end),
            self_device_time_total=end - start,
            device_type=DeviceType.CUDA,
            is_user_annotation=is_user_annotation,
        )

    kernels = [event("cutlass_conv", 0, 300_000), event("Memcpy DtoD", 900_000, 1_000_000)]
    ranges = [
        event(name, 0, 1_000_000, True) for name in (STEP, "ProfilerStep#3", "## Call CompiledFxGraph ##")
    ]
    assert profiler._device_busy_seconds(kernels + ranges) == pytest.approx(0.4)
    shares = profiler._group_shares(kernels + ranges, on_gpu=True)
    assert shares == {MATRIX: pytest.approx(0.75), "copies and fills": pytest.approx(0.25)}
