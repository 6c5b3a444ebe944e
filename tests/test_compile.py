import pytest
import torch
import torch._inductor.config

from fasttrain import compile
from fasttrain.compile import (
    CompileCache,
    CompileEstimate,
    cache_of,
    compile_step,
    estimate_compile,
)
from fasttrain.recipe import Recipe
from fasttrain.system import compiler
from tests.helpers import step_of

CPU = torch.device("cpu")


def test_compiling_has_to_pay_within_the_run() -> None:
    def judged(steps: int, compile_seconds: float) -> CompileEstimate:
        return CompileEstimate(
            steps=steps, step_seconds=0.0047, floor_seconds=0.0015, compile_seconds=compile_seconds
        )

    assert judged(40_000, 40) and judged(2_328, 2)
    assert not judged(2_328, 6)  # 24 epochs, of which a compiler saves 2.9 seconds
    assert "eager" in str(judged(2_328, 40)) and "about 2.9 s to gain" in str(judged(2_328, 40))
    assert "compiling" in str(judged(40_000, 40))
    faster = CompileEstimate(steps=100, step_seconds=0.001, floor_seconds=0.002, compile_seconds=1)
    assert faster.gain_seconds == 0 and not faster


@pytest.fixture
def artifacts(monkeypatch, tmp_path) -> dict[str, bytes]:
    """torch's side of the cache: what a compiler has made, and what it was given."""
    torch_has: dict[str, bytes] = {"made": b"kernels", "given": b""}
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (torch_has["made"], None))
    monkeypatch.setattr(
        torch.compiler, "load_cache_artifacts", lambda content: torch_has.update(given=content)
    )
    return torch_has


def test_what_was_compiled_serves_the_next_process_and_tells_how_long_that_takes(
    artifacts, monkeypatch, tmp_path
) -> None:
    cache = CompileCache("a GPU", "bf16", 512)
    cache.load()
    assert artifacts["given"] == b"" and cache.expected_seconds == compile.COLD_SECONDS
    cache.save(31.0)
    assert CompileCache("a GPU", "bf16", 512).expected_seconds == compile.WARM_SECONDS
    assert CompileCache("another GPU", "bf16", 512).expected_seconds == compile.COLD_SECONDS

    monkeypatch.setattr(
        torch.compiler, "load_cache_artifacts", lambda content: artifacts.update(given=content) or "found"
    )
    again = CompileCache("a GPU", "bf16", 512)
    again.load()
    assert artifacts["given"] == b"kernels"
    again.save(3.5)
    again.save(0.01)  # a second network of this process
    assert CompileCache("a GPU", "bf16", 512).expected_seconds == 3.5
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".bin", ".json"}


def test_a_cache_that_cannot_be_used_stops_nothing(artifacts, monkeypatch, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = CompileCache("a GPU")
    cache.load()
    cache.save(31.0)
    assert cache.expected_seconds == compile.COLD_SECONDS
    (tmp_path / "cache").unlink()
    cache.save(31.0)
    [file] = (tmp_path / "cache").iterdir()
    file.with_suffix(".json").write_text("{torn")
    assert cache.expected_seconds == compile.WARM_SECONDS

    def refuse(content: bytes) -> None:
        raise RuntimeError("another version's")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refuse)
    cache.load()


def test_a_step_is_compiled_with_what_the_cache_holds(artifacts, monkeypatch) -> None:
    order: list[str] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager"))
    monkeypatch.setattr(CompileCache, "load", lambda self: order.append("load"))
    monkeypatch.setattr(CompileCache, "save", lambda self, seconds: order.append("save"))
    step = step_of(Recipe(width=8), total_steps=100)
    images, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    found = estimate_compile(step, CompileCache("a CPU"), 1.0, images, labels)
    assert found.steps == 100 and found.step_seconds > found.floor_seconds > 0
    assert step.step == 0 and not step.model.prep[1].running_mean.any()
    assert compile_step(step, None, CompileCache("a CPU"), images, labels) == (None, 0) and not order
    mode, seconds = compile_step(step, "default", CompileCache("a CPU"), images, labels)
    assert mode == "default" and seconds > 0
    assert order == ["load", "save"]


def test_steps_of_another_shape_or_activation_have_a_cache_of_their_own() -> None:
    def files(batch_size: int = 8, **fields) -> str:
        step = step_of(Recipe(**{"width": 8, **fields}))
        return str(cache_of(step, "a GPU", "default", batch_size)._artifacts)

    others = (files(16), files(width=4), files(activation="gelu"), files(resolution=48))
    assert len({files(), *others}) == 5 and files() == files(seed=1)


def test_a_missing_compiler_is_named_with_its_remedy() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "install g++" in (compiler.compiler_available(CPU) or "")
