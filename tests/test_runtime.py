"""What a recipe leaves to the machine is decided once, and what is missing is said in a line."""

import sys

import pytest
import torch

from fasttrain import runtime as runtime_module
from fasttrain.data.build_loader import dali_unusable
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime, can_capture
from fasttrain.system import compiler
from fasttrain.system.compiler import pick_compile_mode
from fasttrain.system.fallbacks import Fallbacks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    dali_unusable.cache_clear()
    yield
    dali_unusable.cache_clear()


def test_compile_policy_is_eager_on_a_cpu_and_falls_back_in_one_line(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(compiler, "compiler_available", lambda device: None)
    assert pick_compile_mode("auto", CPU, Fallbacks(said.append)) is None
    assert pick_compile_mode("off", GPU, Fallbacks(said.append)) is None
    assert pick_compile_mode("auto", GPU, Fallbacks(said.append)) == "default"
    assert pick_compile_mode("max-autotune", CPU, Fallbacks(said.append)) == "max-autotune"
    assert not said
    monkeypatch.setattr(compiler, "compiler_available", lambda device: "no C++ compiler: install g++")
    assert pick_compile_mode("auto", GPU, Fallbacks(said.append)) is None
    assert len(said) == 1 and "install g++" in said[0] and "eager" in said[0]
    with pytest.raises(UserError, match="--compile default: no C"):
        pick_compile_mode("default", CPU, Fallbacks(said.append))


@pytest.mark.parametrize(
    ("device", "mode", "fields", "expected"),
    [
        (GPU, None, {}, True),
        (GPU, "default", {}, True),
        (GPU, "reduce-overhead", {}, False),  # captures its own graphs
        (GPU, "default", {"cuda_graph": False}, False),
        (CPU, None, {}, False),
    ],
)
def test_a_step_is_captured_once_at_most_and_only_on_an_nvidia_gpu(device, mode, fields, expected) -> None:
    assert can_capture(Recipe(**fields), device, mode) is expected


def test_with_several_ranks_no_step_is_captured() -> None:
    assert can_capture(Recipe(), GPU, None) and not can_capture(Recipe(), GPU, None, num_ranks=2)


def test_everything_is_decided_at_once_and_each_fallback_is_a_line(no_dali, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "compiler_available", lambda device: "no C++ compiler: install g++")
    monkeypatch.setattr(
        runtime_module, "pick_compile_mode", lambda mode, _, log: pick_compile_mode(mode, GPU, log)
    )
    runtime = Runtime.resolve(Recipe(compute_dtype="fp32"), CPU, fallbacks=Fallbacks(lambda _: None))
    assert runtime == Runtime(device=CPU, precision="fp32", loader="tensor")
    assert runtime.dtype == torch.float32
    assert ["compile" in line or "loader" in line for line in runtime.fallbacks.lines] == [True, True]


def test_a_kept_precision_comes_before_the_recipes() -> None:
    recipe = Recipe(compute_dtype="fp32", loader="tensor")
    assert Runtime.resolve(recipe, CPU, precision="bf16").dtype == torch.bfloat16


def test_what_is_not_compiled_asks_for_no_compiler(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "compiler_available", lambda device: pytest.fail("asked"))
    recipe = Recipe(compute_dtype="fp32", loader="tensor", compile="default")
    assert Runtime.resolve(recipe, CPU, compiles=False).compile_mode is None


def test_what_was_asked_for_by_name_is_not_replaced(no_dali) -> None:
    with pytest.raises(UserError, match="--loader dali"):
        Runtime.resolve(Recipe(compute_dtype="fp32", loader="dali"), CPU)
    with pytest.raises(UserError, match="--compute-dtype tf32"):
        Runtime.resolve(Recipe(compute_dtype="tf32"), CPU)
