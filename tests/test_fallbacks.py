"""What fails on a machine is replaced with one line, or is an error; every failure here is injected."""

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fasttrain import compile as compile_module
from fasttrain import optim, train
from fasttrain import runtime as runtime_module
from fasttrain import step as step_module
from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.cli import main
from fasttrain.compile import example_batch
from fasttrain.cuda_graph import CaptureError
from fasttrain.data import build_loader
from fasttrain.data.build_loader import pick_loader
from fasttrain.distributed import World
from fasttrain.errors import UserError, one_line
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.system import memory, precision
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.precision import pick_precision
from tests.helpers import CPU, step_of

GPU = torch.device("cuda", 0)

try:
    import nvidia.dali  # noqa: F401
except ImportError:
    pytest.skip("DALI has no wheel here", allow_module_level=True)


def fail(text: str):
    def raises(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    return raises


@pytest.fixture
def broken_dali(monkeypatch: pytest.MonkeyPatch):
    """A DALI that imports and does not run, as with an old driver."""
    from fasttrain.data.dali import DaliLoader

    monkeypatch.setattr(DaliLoader, "_build", fail("CUDA driver version is insufficient\nfor CUDA runtime"))
    build_loader.dali_unusable.cache_clear()
    yield
    build_loader.dali_unusable.cache_clear()


def test_a_line_is_logged_and_kept_or_is_an_error() -> None:
    said: list[str] = []
    fallbacks = Fallbacks(said.append)
    fallbacks("bf16 fails", "computing in fp16")
    assert said == fallbacks.lines == ["bf16 fails; computing in fp16"]
    with pytest.raises(UserError, match=r"^bf16 fails; --no-fallback allows nothing in its place$"):
        Fallbacks(pytest.fail, allowed=False)("bf16 fails", "computing in fp16")
    assert one_line(RuntimeError("a\n  b")) == "a b" and one_line(KeyError()) == "KeyError"
    assert len(one_line(RuntimeError("x" * 999))) == 200


def test_a_dali_that_does_not_run_is_replaced(broken_dali) -> None:
    fallbacks = Fallbacks(lambda _: None)
    assert pick_loader("auto", CPU, fallbacks) == "tensor"
    [line] = fallbacks.lines
    assert "DALI fails on cpu (CUDA driver version is insufficient for CUDA runtime)" in line
    assert "pure-torch loader" in line
    with pytest.raises(UserError, match=r"--loader dali: DALI fails on cpu .*; or use --loader tensor"):
        pick_loader("dali", CPU, fallbacks)
    with pytest.raises(UserError, match=r"loader: DALI fails .*; --no-fallback"):
        pick_loader("auto", CPU, Fallbacks(allowed=False))


def test_a_dali_with_other_pixels_is_replaced(monkeypatch) -> None:
    from fasttrain.data import dali

    right = dali.warp_matrices
    monkeypatch.setattr(dali, "warp_matrices", lambda params, side: right(params, side + 1))
    build_loader.dali_unusable.cache_clear()
    fallbacks = Fallbacks(lambda _: None)
    try:
        assert pick_loader("auto", CPU, fallbacks) == "tensor"
    finally:
        build_loader.dali_unusable.cache_clear()
    assert "pixels on cpu are not the expected ones" in fallbacks.lines[0]


@pytest.mark.parametrize(
    ("failing", "chosen"), [((), "bf16"), (("bf16",), "fp16"), (("bf16", "fp16"), "fp32")]
)
def test_a_precision_that_fails_is_replaced_by_the_next(monkeypatch, failing, chosen) -> None:
    reasons = {name: f"{name} fails on cuda:0 (no kernel image)" for name in failing}
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: True)
    monkeypatch.setattr(precision, "fails_in", lambda name, _: reasons.get(name))
    fallbacks = Fallbacks(lambda _: None)
    assert pick_precision("auto", GPU, fallbacks) == chosen
    assert len(fallbacks.lines) == len(failing)
    if failing:
        assert "bf16 fails on cuda:0 (no kernel image); computing in fp16" in fallbacks.lines[0]
        with pytest.raises(UserError, match="--compute-dtype bf16: bf16 fails"):
            pick_precision("bf16", GPU, fallbacks)
        with pytest.raises(UserError, match="--no-fallback"):
            pick_precision("auto", GPU, Fallbacks(allowed=False))


def test_a_convolution_is_tried_forwards_and_backwards(monkeypatch) -> None:
    tried = precision.fails_in.__wrapped__
    assert tried("bf16", CPU) is None
    conv2d = precision.functional.conv2d
    monkeypatch.setattr(precision.functional, "conv2d", lambda *args, **more: 2 * conv2d(*args, **more))
    assert tried("bf16", CPU) == "a convolution in bf16 gives wrong values on cpu"
    monkeypatch.setattr(precision.functional, "conv2d", fail("CUDNN_STATUS_NOT_SUPPORTED"))
    assert tried("bf16", CPU) == "bf16 fails on cpu (CUDNN_STATUS_NOT_SUPPORTED)"


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch) -> None:
    memory.pinning_fails.cache_clear()
    monkeypatch.setattr(torch, "empty", fail("CUDA error: OS call failed"))
    try:
        assert memory.pinning_fails() == "CUDA error: OS call failed"
    finally:
        monkeypatch.undo()
    tensor = torch.ones(3)
    assert memory.pinned(tensor) is tensor
    for name in ("prepare", "fused_fails"):
        monkeypatch.setattr(runtime_module, name, lambda *_: None)
    monkeypatch.setattr(runtime_module, "pick_loader", lambda *_: "tensor")
    fallbacks = Fallbacks(lambda _: None)
    try:
        Runtime.resolve(Recipe(), GPU, precision="fp32", compiles=False, fallbacks=fallbacks)
    finally:
        memory.pinning_fails.cache_clear()
    assert fallbacks.lines[0].startswith("pinned memory: CUDA error: OS call failed; the host waits")


def test_an_optimizer_whose_fused_kernel_fails_is_not_fused(monkeypatch) -> None:
    step = torch.optim.AdamW.step
    optim.fused_fails.cache_clear()
    try:
        assert optim.fused_fails(CPU) is None
        optim.fused_fails.cache_clear()
        monkeypatch.setattr(torch.optim.AdamW, "step", fail("no kernel image is available"))
        assert optim.fused_fails(CPU) == "fused AdamW fails on cpu (no kernel image is available)"
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        fallbacks = Fallbacks(lambda _: None)
        runtime = Runtime.resolve(Recipe(compute_dtype="fp32", loader="tensor"), CPU, fallbacks=fallbacks)
    finally:
        optim.fused_fails.cache_clear()
    assert not runtime.fused_optimizer and "using the unfused one" in fallbacks.lines[0]
    recipe = Recipe(width=4, ema_epochs=1.0, optimizer="muon")
    fused, unfused = (step_of(recipe, fused_optimizer=on) for on in (True, False))
    settings = [
        (step.optimizer.defaults["fused"], step.optimizer.defaults["foreach"]) for step in (fused, unfused)
    ]
    assert settings == [(True, None), (None, True)]
    for one in (fused, unfused):
        one.model.load_state_dict(fused.model.state_dict())
    monkeypatch.setattr(torch, "_fused_sgd_", fail("never used where fused kernels fail"))
    for _ in range(3):
        unfused(*example_batch(8, 32, CPU))
    monkeypatch.undo()
    for _ in range(3):
        fused(*example_batch(8, 32, CPU))
    for ours, theirs in zip(unfused.eval_model.parameters(), fused.eval_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"optimizer": "muon", "ema_epochs": 1.0}, {"cycle_momentum": True}])
def test_a_step_that_cannot_be_captured_trains_without(monkeypatch, fields: dict) -> None:
    """It fails after the calls that warm up, whose traces have to go too."""

    def capture(works, images, labels):
        for work in works:
            work(images, labels)
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step_module, "capture", capture)
    recipe, fallbacks = (
        Recipe(width=4, early_scale=0.5, early_share=0.1, **fields),
        Fallbacks(lambda _: None),
    )
    torch.manual_seed(0)
    captured = step_of(recipe, cuda_graph=True, fallbacks=fallbacks)
    torch.manual_seed(0)
    eager = step_of(recipe)
    for step in (captured, eager):
        for _ in range(5):
            step(*example_batch(8, 32, CPU))
    assert not captured.captures and len(fallbacks.lines) == 1
    assert "CUDA graph: the capture failed (operation not permitted" in fallbacks.lines[0]
    for ours, theirs in zip(captured.eval_model.parameters(), eager.eval_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert captured.take_metrics() == eager.take_metrics()
    strict = step_of(recipe, cuda_graph=True, fallbacks=Fallbacks(allowed=False))
    with pytest.raises(UserError, match=r"CUDA graph: .*; --no-fallback"):
        strict(*example_batch(8, 32, CPU))


def broken_compiler(model: object, **_: object):
    def forward(*_: object) -> None:
        raise torch._dynamo.exc.InternalTorchDynamoError("CalledProcessError: gcc\nreturned 1")

    return forward


def test_a_training_that_cannot_be_compiled_runs_eagerly(
    dataset_dir: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(runtime_module, "pick_compile_mode", lambda *_: "default")
    monkeypatch.setattr(compile_module, "estimate_compile", lambda *_: True)
    recipe = Recipe(epochs=1, batch_size=16, width=4, compute_dtype="fp32", loader="tensor")
    settings = {"data_dir": dataset_dir, "device": "cpu", "report": True}
    monkeypatch.setattr(torch, "compile", broken_compiler)
    run = train(recipe, out=tmp_path, **settings)
    assert run.result["compile"] == "off" and run.machine["compile"] is None
    [line] = run.result["fallbacks"]
    assert "torch.compile: CalledProcessError: gcc returned 1; running eager" in line
    assert line in capsys.readouterr().out and line in (run.folder / "report.html").read_text()
    assert load_checkpoint(run.folder / "last.pt")["fingerprint"]["compile"] == "off"
    with pytest.raises(UserError, match="--compile default: CalledProcessError: gcc returned 1"):
        train(dataclasses.replace(recipe, compile="default"), out=tmp_path, **settings)
    with pytest.raises(UserError, match=r"torch.compile: .*; --no-fallback"):
        train(recipe, out=tmp_path, fallback=False, **settings)


@pytest.mark.parametrize("name", ["2-core-amd-epyc/runs/laptop-cifar10-jpeg-q75"])
def test_a_page_of_an_older_run_knows_nothing_of_fallbacks(name: str, tmp_path) -> None:
    [folder] = Path("benchmarks/results").rglob(name) if Path("benchmarks/results").is_dir() else [None]
    shutil.copytree(folder, tmp_path / name)
    assert main(["report", str(tmp_path / name), "--data-dir", str(tmp_path)]) == 0
    assert "Not as fast" not in (tmp_path / name / "report.html").read_text()


def test_several_ranks_compute_in_a_precision_that_works_on_all_of_them(monkeypatch) -> None:
    world, fallbacks = World(device=CPU), Fallbacks(lambda _: None)
    monkeypatch.setattr(runtime_module, "pick_precision", lambda *_: "bf16")
    monkeypatch.setattr(runtime_module, "fails_in", lambda *_: None)
    assert runtime_module.agree_on_precision(Recipe(), world, fallbacks) == "bf16" and not fallbacks.lines
    monkeypatch.setattr(World, "gather", lambda _, own: [own, "bf16 fails on cuda:1 (no kernel image)"])
    assert runtime_module.agree_on_precision(Recipe(), world, fallbacks) == "fp32"
    assert fallbacks.lines[0].startswith("precision: bf16 fails on cuda:1")


def test_with_several_ranks_a_failure_to_compile_ends_the_run(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", broken_compiler)
    step = step_of(Recipe(width=4))
    step.world = dataclasses.replace(step.world, size=2)
    monkeypatch.setattr(step, "warm_up", fail("gcc returned 1"))
    with pytest.raises(UserError, match="--compile default: gcc returned 1; or use --compile off"):
        compile_module.compile_step(
            step, "default", compile_module.CompileCache("a CPU"), *example_batch(8, 32, CPU)
        )


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_while_dali_is_tried_is_not_its_failure(monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise ImportError("initialization failed")  # what DALI makes of the signal's exception

    monkeypatch.setattr(build_loader, "_first_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_loader.dali_unusable.__wrapped__(torch.device("cpu"))
