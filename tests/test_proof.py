"""A checkpoint's proof finds what no weight's name and shape can show, and lets rounding pass."""

import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import model as model_module
from fasttrain.checkpoint.file import load_checkpoint, save_checkpoint
from fasttrain.checkpoint.network import load_trained_model, restore_model
from fasttrain.checkpoint.proof import TOLERANCE, proof_images, proof_logits, require_proven
from fasttrain.errors import UserError
from fasttrain.model import CompactNet, CustomResNet, ImageClassifier, build_model
from fasttrain.recipe import Recipe
from tests.helpers import OTHER_VALUES, checkpoint_of, experienced_network

CPU = torch.device("cpu")
CLASSES = [f"class {label}" for label in range(10)]
NARROW = Recipe(width=4)
FIELDS = [field.name for field in dataclasses.fields(Recipe)]


def changed(field: str) -> Recipe:
    return dataclasses.replace(NARROW, **{field: OTHER_VALUES[field]})


def test_there_is_another_value_for_every_field() -> None:
    assert list(OTHER_VALUES) == FIELDS
    assert all(getattr(changed(field), field) != getattr(Recipe(), field) for field in FIELDS)


@pytest.mark.parametrize(("name", "network"), [("resnet", CustomResNet), ("compact", CompactNet)])
def test_the_network_is_told_every_setting_that_it_has_by_the_recipe(name, network, monkeypatch) -> None:
    """So a setting that a network gains is a field of the recipe, with the same default, and passed on."""
    signature, told = inspect.signature(network), {}
    settings = signature.parameters.keys() - {"num_classes", "mean", "std"}

    def spy(*args, **settings) -> ImageClassifier:
        told.update(signature.bind(*args, **settings).arguments)
        return network(*args, **settings)

    monkeypatch.setattr(model_module, network.__name__, spy)
    expected = {setting: OTHER_VALUES[setting] for setting in settings}
    build_model(Recipe(network=name, **expected), 7, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert told == expected | {"num_classes": 7, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    assert all(signature.parameters[setting].default == getattr(Recipe(), setting) for setting in settings)


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_a_recipe_says_its_checkpoint_gives_the_network_that_was_saved(field: str, tmp_path) -> None:
    recipe, path = changed(field), tmp_path / "last.pt"
    model = experienced_network(recipe, mean=(0.1, 0.5, 0.9))
    save_checkpoint(path, checkpoint_of(model, recipe, CLASSES))
    loaded = load_trained_model(path, CPU, pytest.fail)
    images_NCHW = torch.randint(256, (5, 3, recipe.resolution, recipe.resolution), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images_NCHW), model(images_NCHW))
    assert repr(loaded.model) == repr(model) and not loaded.model.training
    assert loaded.recipe == recipe and loaded.classes == CLASSES


@pytest.mark.parametrize("lost", ["activation", "a weight", "statistics", "logit_scale"])
def test_a_network_that_came_back_otherwise_is_refused_with_the_difference(lost: str, tmp_path) -> None:
    recipe = dataclasses.replace(NARROW, activation="gelu")
    model = experienced_network(recipe)
    path, state = tmp_path / "last.pt", checkpoint_of(model, recipe, CLASSES)
    if lost == "activation":
        state["recipe"] = state["recipe"] | {"activation": "relu"}
    elif lost == "a weight":
        state["model"]["res1.0.weight"][0, 0, 1, 1] += 1.0
    elif lost == "statistics":
        state["model"]["res2.1.running_var"].mul_(2)
    else:
        state["model"]["logit_scale"].fill_(0.5)
    save_checkpoint(path, state)
    with pytest.raises(UserError, match=r"last\.pt: .*logits of the proof images differ by \d") as error:
        load_trained_model(path, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "proof",
    [
        *(None, "text", torch.zeros(4, 9), torch.full((4, 10), float("nan"))),
        *(torch.zeros(4, 10, dtype=torch.bool), torch.zeros(4, 10).to_sparse()),
    ],
)
def test_a_proof_that_is_none_is_refused(proof, tmp_path) -> None:
    save_checkpoint(
        tmp_path / "last.pt", checkpoint_of(build_model(NARROW, 10), NARROW, CLASSES, proof=proof)
    )
    with pytest.raises(UserError, match=r"last\.pt: .*proof"):
        load_trained_model(tmp_path / "last.pt", CPU)


def test_another_order_of_sums_is_rounding() -> None:
    """Double precision stands for any other hardware: it rounds at none of the same places."""
    model = experienced_network(Recipe(activation="gelu"))
    logits_NK = proof_logits(model)
    exact = experienced_network(Recipe(activation="gelu")).double()
    exact.normalize = lambda images: (  # type: ignore[method-assign]  # the original casts to float32
        (images.double() - exact.mean.reshape(3, 1, 1)) * exact.inverse_std.reshape(3, 1, 1)
    )
    difference = (proof_logits(exact) - logits_NK).abs().max() / logits_NK.abs().max()
    assert 0 < difference < TOLERANCE / 10
    require_proven(model, proof_logits(exact).float())
    with pytest.raises(UserError, match="differ by"):
        require_proven(model, logits_NK + 2 * TOLERANCE * logits_NK.abs().max())


def test_the_images_never_change() -> None:
    """Whoever changes them makes every checkpoint so far look like another network."""
    digests = {16: "99b5551489e4d66d", 32: "0c7880d0e23cb3b6", 256: "59b7f3107722864e"}
    for resolution, digest in digests.items():
        images_NCHW = proof_images(resolution, CPU)
        assert images_NCHW.shape == (4, 3, resolution, resolution)
        assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
        assert hashlib.sha256(images_NCHW.contiguous().numpy().tobytes()).hexdigest()[:16] == digest


def test_a_proof_leaves_mode_generators_and_precision_alone() -> None:
    model = build_model(dataclasses.replace(NARROW, dropout=0.5), 10).train()
    statistics = [buffer.clone() for buffer in model.buffers()]
    before = torch.get_rng_state()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        first, second = proof_logits(model), proof_logits(model)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    assert torch.equal(first, second) and first.dtype == torch.float32 and not first.requires_grad
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, model.buffers(), statistics))


@pytest.mark.parametrize("newer", ["backends", "cudnn", "cuda.matmul", "cudnn.conv"])
def test_a_proof_is_exact_whatever_torchs_newer_settings_say(newer: str) -> None:
    """In a process of its own: torch never quite forgets that they were used."""
    owner = "torch.backends" if newer == "backends" else f"torch.backends.{newer}"
    code = f"""
import torch
from fasttrain.system.precision import exact_float32, set_fp32_precision
from fasttrain.model import build_model
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.recipe import Recipe
{owner}.fp32_precision = "tf32"
with exact_float32():
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
proof_logits(build_model(Recipe(width=2), 10))
{owner}.fp32_precision = "tf32"
set_fp32_precision(False)
assert torch.backends.cudnn.conv.fp32_precision != "tf32" and not torch.backends.cudnn.allow_tf32
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_proof_is_exact_where_onednn_may_round_to_bf16() -> None:
    code = """
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.recipe import Recipe
from tests.helpers import experienced_network
print(proof_logits(experienced_network(Recipe(width=8))).tolist())
"""
    coarse = os.environ | {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}
    logits_NK = torch.tensor(json.loads(subprocess.check_output([sys.executable, "-c", code], env=coarse)))
    expected_NK = proof_logits(experienced_network(Recipe(width=8)))
    torch.testing.assert_close(logits_NK, expected_NK, rtol=1e-5, atol=1e-6)


def test_a_proof_takes_few_launches_and_waits_for_nothing() -> None:
    """About 50 operations at some microseconds of the host: a fraction of a millisecond on a GPU."""
    model, called = build_model(Recipe(), 10), []
    proof_images(32, CPU)  # made once for a process

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Count():
        proof_logits(model)
    assert len(called) <= 60
    waiting = ("_local_scalar_dense", "nonzero", "item", "equal.default", "copy_")
    assert not [name for name in called if any(part in name for part in waiting)]


@pytest.mark.gpu
def test_a_gpus_proof_holds_on_a_cpu_and_never_waits() -> None:
    device = torch.device("cuda")
    model = experienced_network(Recipe(activation="gelu"))
    on_cpu = proof_logits(model)
    model.to(device)
    proof_logits(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = proof_logits(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (on_gpu.cpu() - on_cpu).abs().max() < TOLERANCE / 4 * on_cpu.abs().max()


def test_a_checkpoint_of_before_is_rebuilt_from_its_recipe_and_said_to_be_unproven(tmp_path, capsys) -> None:
    recipe, path = dataclasses.replace(NARROW, activation="gelu"), tmp_path / "last.pt"
    model = experienced_network(recipe)
    state = checkpoint_of(model, recipe, CLASSES)
    del state["proof"]
    save_checkpoint(path, state)
    said: list[str] = []
    loaded = load_trained_model(path, CPU, said.append)
    assert torch.equal(proof_logits(loaded.model), proof_logits(model))
    assert len(said) == 1 and said[0].startswith(f"{path}: unproven") and "\n" not in said[0]
    load_trained_model(path, CPU)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{said[0]}\n")
    del state["recipe"]["width"]  # as of before it was a field: the width was 64
    save_checkpoint(path, state)
    with pytest.raises(UserError, match=r"last\.pt: its weights do not fit"):
        load_trained_model(path, CPU)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("key", ["recipe", "classes", "progress", "metrics", "epoch", "model", "fingerprint"])
@pytest.mark.parametrize(
    "value", [None, 1, "text", [], {}, [[]], {"epochs": [1]}, {"epochs": [{}]}, {"precision": ["bf16"]}]
)
def test_what_a_foreign_hand_wrote_is_one_line(key: str, value, tmp_path: Path) -> None:
    state = checkpoint_of(build_model(NARROW, 10), NARROW, CLASSES) | {key: value}
    save_checkpoint(tmp_path / "last.pt", state)
    try:
        load_trained_model(tmp_path / "last.pt", CPU)
    except UserError as error:
        assert "last.pt" in str(error) and "\n" not in str(error)


def test_weights_of_another_network_are_one_line() -> None:
    state = checkpoint_of(build_model(Recipe(width=8), 10), NARROW, CLASSES)
    with pytest.raises(UserError, match="do not fit"):
        restore_model(state, NARROW, 10, CPU)


def test_a_loaded_network_draws_nothing_from_the_callers_generator(tmp_path) -> None:
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(build_model(NARROW, 10), NARROW, CLASSES))
    before = torch.get_rng_state()
    load_trained_model(tmp_path / "last.pt", CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert load_checkpoint(tmp_path / "last.pt")["proof"].shape == (4, 10)
