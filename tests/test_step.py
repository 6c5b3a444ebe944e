import copy
import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import conv
from fasttrain import step as step_module
from fasttrain.optim import one_cycle
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.step import TrainStep, shrink
from tests.helpers import CPU, step_of

GPU = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)
COMPILES = pytest.mark.gpu(seconds=13)
"""The mean of five tests: two networks are compiled, in 25 s each, and then torch's cache has them."""


def batch(device: torch.device = CPU, count: int = 8, side: int = 32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (count,), generator=generator).to(device)
    return images.to(memory_format=torch.channels_last), labels


def build(precision="bf16", device=CPU, compile_mode=None, cuda_graph=False, **fields) -> TrainStep:
    """A step that begins alike every time; on a CPU, with a narrow network."""
    torch.manual_seed(0)
    recipe = Recipe(**{"width": 16 if device == CPU else 64, **fields})
    step = step_of(recipe, device=device, precision=precision, cuda_graph=cuda_graph)
    if compile_mode:
        step.compile(compile_mode)
    return step


def test_a_float32_step_is_the_textbook_step() -> None:
    """Against plain torch: forward, smoothed cross entropy, backward, AdamW with OneCycleLR's first rate."""
    step = build("fp32", weight_decay=0.1, label_smoothing=0.2)
    model = copy.deepcopy(step.model)
    images, labels = batch()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=0.01 / 25,
    )
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    loss.backward()
    optimizer.step()

    step(images, labels)
    mean_loss, accuracy = step.take_metrics()
    assert mean_loss == pytest.approx(loss.item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).float().mean().item()
    assert step.lr == pytest.approx(0.01 / 25)
    for ours, reference in zip(step.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_metrics_are_means_over_the_images_since_the_last_call() -> None:
    step = build()
    images, labels = batch()
    step(images, labels)
    first = step.take_metrics()
    step(images, labels)
    step(images, labels)
    second = step.take_metrics()
    assert second[0] < first[0] * 1.5  # one mean, not a sum of two
    assert 0 <= second[1] <= 1


def test_a_few_steps_on_one_batch_learn_it() -> None:
    step = build(label_smoothing=0.0)
    images, labels = batch()
    losses = []
    for _ in range(12):
        step(images, labels)
        loss, accuracy = step.take_metrics()
        losses.append(loss)
    assert accuracy == 1 and losses[-1] < losses[0] / 4


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    step = build()
    seen = []
    step.model.layer1[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    step(*batch())
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}


def test_a_peek_gives_the_same_figures_and_takes_nothing_away() -> None:
    step = build()
    assert step.peek_metrics() is None
    step(*batch())
    peeked = step.peek_metrics()
    assert peeked == step.peek_metrics() == step.take_metrics()
    assert step.peek_metrics() is None


def test_a_peek_at_a_gpu_reads_only_what_has_arrived(monkeypatch) -> None:
    """With a stand-in for the event that says when a copy has arrived; the copy itself lands at once."""

    class Event:
        has_arrived = False

        def record(self, _: object) -> None:
            copies.append(self)

        def query(self) -> bool:
            return self.has_arrived

    copies: list[Event] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory: zeros(*size))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    peek = step_module._Peek(torch.device("cuda"))
    assert peek(torch.tensor([0.0, 0.0]), 0) is None and not copies
    assert peek(torch.tensor([6.0, 1.0]), 4) is None and len(copies) == 1
    assert peek(torch.tensor([8.0, 2.0]), 8) is None and len(copies) == 1  # one copy at a time
    copies[0].has_arrived = True
    assert peek(torch.tensor([9.0, 3.0]), 12) == (1.5, 0.25) and len(copies) == 2
    assert peek(torch.tensor([9.9, 4.0]), 16) == (1.5, 0.25) and len(copies) == 2
    copies[1].has_arrived = True
    assert peek(torch.tensor([9.9, 4.0]), 16) == (0.75, 0.25)
    monkeypatch.undo()
    step = build()
    step._peek = peek
    step.take_metrics()
    assert peek._newest is None and peek._under_way is None  # nothing of the epoch before


def test_the_schedule_ends_where_it_was_said_to_end() -> None:
    step = build()
    step.step = 20
    with pytest.raises(ValueError, match="past the schedule"):
        step(*batch())


@pytest.mark.parametrize(
    "fields",
    [
        {"cycle_momentum": True},
        {"ema_epochs": 2.0, "bn_bias_lr_scale": 4.0, "init": "dirac"},
        {"optimizer": "muon", "ema_epochs": 2.0},
    ],
)
def test_a_restored_step_goes_on_exactly(fields: dict) -> None:
    images, labels = batch()
    first = build(**fields)
    for _ in range(3):
        first(images, labels)
    second = build(**fields)
    second.eval_model.load_state_dict(copy.deepcopy(first.eval_model.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (first, second):
        step(images, labels)
    for models in ((second.model, first.model), (second.eval_model, first.eval_model)):
        ours, expected = (model.state_dict().values() for model in models)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_an_average_follows_the_training_and_does_not_change_it() -> None:
    images, labels = batch()
    plain, averaged = build(), build(ema_epochs=12.0)  # 10 of the 20 steps
    trail = []
    for _ in range(3):
        for step in (plain, averaged):
            step(images, labels)
        trail.append(averaged.model.fc.weight.detach().clone())
    assert plain.eval_model is plain.model and averaged.eval_model is not averaged.model
    for ours, expected in zip(averaged.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    shares = [math.exp(-age / 10) for age in (2, 1, 0)]
    expected = sum(share * weights for share, weights in zip(shares, trail, strict=True)) / sum(shares)
    torch.testing.assert_close(averaged.eval_model.fc.weight, expected)
    statistics = [step.eval_model.prep[1].running_mean for step in (plain, averaged)]
    assert not torch.equal(*statistics)


def test_the_first_step_with_a_loss_that_is_no_number_is_named() -> None:
    step = build("fp32")
    images, labels = batch()
    step(images, labels)
    assert step.diverged() is None
    step.take_metrics()
    step(images, labels)
    assert step.diverged() is None
    with torch.no_grad():
        step.model.fc.bias.fill_(float("inf"))
    assert step.diverged() == 2  # the weights that step 2 left
    for _ in range(2):
        step(images, labels)
    assert step.diverged() == 3  # the loss of step 3, and of those after it


def test_nothing_of_the_groups_settings_is_taken_from_a_file() -> None:
    first, second = build(weight_decay=0.1), build(weight_decay=0.1)
    first(*batch())
    state = copy.deepcopy(first.state_dict())
    state["optimizer"]["param_groups"][0]["weight_decay"] = 0.9
    second.load_state_dict(state)
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.1 and second.lr == first.lr


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=COMPILES)])
def test_compiling_changes_neither_the_model_nor_the_result(device: torch.device, monkeypatch) -> None:
    if device.type == "cpu":
        # Inductor needs half a minute to compile on a CPU; the machinery around it is what is tested here.
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="aot_eager"))
    eager, compiled = build(device=device), build(device=device, compile_mode="default")
    images, labels = batch(device, count=8 if device == CPU else 64)
    before = copy.deepcopy(compiled.model.state_dict())
    assert eager.warm_up(images, labels) == 0 and compiled.warm_up(images, labels) > 0
    for name, value in compiled.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in compiled.model.parameters())
    assert not any("_orig_mod" in name for name in compiled.model.state_dict())
    losses = []
    for step in (eager, compiled):
        for _ in range(3):
            step(images, labels)
        losses.append(step.take_metrics()[0])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.fixture
def captures(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A stand-in for CUDA graphs that calls the work where they replay it; lists what it captured on."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def capture(work, images, labels):
        for _ in range(3):
            work(images, labels)
        kept = images.clone(), labels.clone()
        made.append(kept)

        def replay(images, labels) -> None:
            kept[0].copy_(images)
            kept[1].copy_(labels)
            work(*kept)

        return replay

    monkeypatch.setattr(
        step_module, "capture", lambda works, *batch: [capture(work, *batch) for work in works]
    )
    return made


def addresses(step: TrainStep) -> list[int]:
    tensors = [*step.model.parameters(), *step.model.buffers(), step._sums, *step._optimizer_tensors()]
    tensors += step.average.tensors if step.average else []
    tensors += [*step._table.values, step._table.step] if step._table else []
    tensors += [g["lr"] for g in step.optimizer.param_groups if isinstance(g["lr"], torch.Tensor)]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cycle_momentum": True},
        {"optimizer": "muon"},
        {"resolution": 24, "early_scale": 2 / 3, "early_share": 0.15},  # 3 of 20 steps
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_captured_step_trains_as_an_eager_one(
    captures, precision, fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(*args: Any) -> tuple[float, float | None]:
        """The schedule in the float32 of a captured step's rate: a batch of eight magnifies its rounding."""
        lr, beta1 = one_cycle(*args)
        return torch.tensor(lr).item(), beta1

    monkeypatch.setattr(step_module, "one_cycle", rounded)
    # As little as can be: a CPU is slow in float16.
    fields = {"dropout": 0.1, "width": 4, "resolution": 16, "ema_epochs": 4.0} | fields
    eager, captured = (build(precision, cuda_graph=graph, **fields) for graph in (False, True))
    images, labels = batch(side=eager.recipe.resolution)
    losses, counts = [], []
    for step in (eager, captured):
        torch.manual_seed(1)  # the dropout's
        losses.append([])
        for shift in range(6):
            step(images.roll(shift, 0), labels)
            losses[-1].append(step.take_metrics()[0])
            counts.append(len(captures))
    phases = 2 if "early_scale" in fields else 1
    at_once = 1 if precision == "fp16" else phases  # its update, outside of the graph, reads one's gradients
    assert counts == 6 * [0] + 3 * [at_once] + 3 * [phases]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert eager.lr == captured.lr
    for models in ((captured.model, eager.model), (captured.eval_model, eager.eval_model)):
        ours, reference = (model.state_dict() for model in models)
        for name, value in ours.items():
            torch.testing.assert_close(value.float(), reference[name].float(), rtol=1e-2, atol=1e-3)


def test_a_captured_update_takes_its_rate_from_a_tensor_and_no_address_ever_changes(captures) -> None:
    fields = {"width": 8, "ema_epochs": 4.0, "bn_bias_lr_scale": 3.0}
    fields |= {"optimizer": "muon", "muon_lr_scale": 2.0}
    step, (images, labels) = build(cuda_graph=True, **fields), batch()
    step(images, labels)
    before, rates = addresses(step), [1.0, 1.0, 3.0, 2.0]
    for _ in range(3):
        step(images, labels)
        groups = step.optimizer.param_groups
        assert [group["lr"].item() for group in groups] == pytest.approx([step.lr * rate for rate in rates])
        assert [group["betas"] for group in groups] == [(0.9, 0.999)] * len(rates)
    assert addresses(step) == before


def test_a_first_layer_that_is_fixed_from_a_step_on_stays_and_needs_no_gradient() -> None:
    """Until then, and for everything else, the steps are those of a training that never fixes it."""
    images, labels = batch()
    kept, fixed = (
        build("fp32", network="compact", width=4, first_layer_share=share) for share in (1.0, 0.15)
    )
    needs_gradient = []
    fixed.model.whitening.register_forward_hook(lambda *args: needs_gradient.append(args[2].requires_grad))
    biases = []
    for _ in range(5):  # of 20
        kept(images, labels)
        fixed(images, labels)
        biases.append(fixed.model.whitening.bias.detach().clone())
        same_so_far = [
            torch.equal(a, b) for a, b in zip(*(s.model.parameters() for s in (kept, fixed)), strict=True)
        ]
        assert all(same_so_far) == (len(biases) <= 3)
    assert needs_gradient == [True, True, True, False, False]
    assert not torch.equal(biases[0], biases[1]) and not torch.equal(biases[1], biases[2])
    assert torch.equal(biases[2], biases[3]) and torch.equal(biases[3], biases[4])
    assert fixed.model.whitening.bias.grad is None and fixed.model.fc.bias.grad is not None


def test_the_first_share_of_the_steps_sees_shrunk_images() -> None:
    step, (images, labels) = build(early_scale=0.75, early_share=0.2, width=8), batch()
    sides = []
    step.model.prep.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[2:]))
    for _ in range(6):
        step(images, labels)
    assert sides == 4 * [(24, 24)] + 2 * [(32, 32)]
    assert step.warm_up(images, labels) == 0.0
    step.measure_seconds(images, labels)
    assert sides[6:] == 21 * [(32, 32)]


def test_a_shrunk_image_has_the_means_of_what_its_pixels_cover_and_the_whole_one_is_left_alone() -> None:
    images, _ = batch()
    halves = shrink(images, 16).mean((2, 3))
    torch.testing.assert_close(halves, images.float().mean((2, 3)), rtol=0.02, atol=0)
    assert shrink(images, 32) is images
    checks = torch.tensor([0, 255], dtype=torch.uint8).repeat(16).expand(1, 3, 32, 32)
    assert (shrink(checks, 16)[..., 1:-1] - 127.5).abs().max() < 1  # no pixel is skipped


def test_compiling_covers_both_resolutions_before_the_first_step(monkeypatch) -> None:
    step, (images, labels) = build(early_scale=0.5, width=8), batch()
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    step.compile("default")
    step.model.prep.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    step.warm_up(images, labels)
    assert set(seen) == {16, 32}


def test_capturing_leaves_no_trace(captures) -> None:
    step, (images, labels) = build(cuda_graph=True, width=8, dropout=0.5, ema_epochs=4.0), batch()
    before, rng = copy.deepcopy(step.model.state_dict()), torch.get_rng_state()
    average = copy.deepcopy(step.eval_model.state_dict())
    assert step.warm_up(images, labels) > 0 and len(captures) == 1
    assert step.state_dict()["optimizer"]["state"] == {} and step.step == 0
    assert all(torch.equal(now, before[name]) for name, now in step.model.state_dict().items())
    assert all(torch.equal(now, average[name]) for name, now in step.eval_model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(tensor.any() for tensor in step._optimizer_tensors())
    step(images, labels)
    middle = copy.deepcopy(step.state_dict())
    step.measure_seconds(images, labels)
    after = step.state_dict()
    assert torch.equal(after["metrics"]["sums"], middle["metrics"]["sums"])
    for index, state in middle["optimizer"]["state"].items():
        assert all(
            torch.equal(value, after["optimizer"]["state"][index][key]) for key, value in state.items()
        )


def test_a_measured_step_leaves_no_state_to_what_only_earlier_phases_train(captures) -> None:
    fields = {"network": "compact", "width": 4, "first_layer_share": 0.15}
    step, (images, labels) = build(cuda_graph=True, **fields), batch()
    step.measure_seconds(images, labels)  # of the last phase, in which the first layer is fixed
    step.warm_up(images, labels)
    tensors = step._optimizer_tensors()
    assert len(tensors) == 3 * len(list(p for p in step.model.parameters() if p.requires_grad))
    assert not any(tensor.any() for tensor in tensors)


def test_a_restored_step_is_captured_anew_and_goes_on_bit_exactly(captures) -> None:
    step, (images, labels) = build(cuda_graph=True, width=8), batch()
    for _ in range(3):
        step(images, labels)
    state, weights = copy.deepcopy((step.state_dict(), step.model.state_dict()))
    step(images, labels)
    other = build(cuda_graph=True, width=8)
    other(images, labels)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    other(images, labels)
    assert len(captures) == 3 and other.lr == step.lr
    assert all(
        torch.equal(a, b) for a, b in zip(step.model.parameters(), other.model.parameters(), strict=True)
    )


def test_a_captured_step_reads_the_row_of_its_step_whatever_happened_before(captures) -> None:
    """After a warm-up, a measurement, a rollback to half the rate, and close to the schedule's end."""
    step, (images, labels) = build(cuda_graph=True, width=4, ema_epochs=4.0), batch()

    def takes_its_row() -> None:
        number, scale = step.step, step.optimizer.param_groups[0]["lr_scale"]
        lr, _ = one_cycle(number, step.total_steps, step.max_lr, step.recipe)
        step(images, labels)
        *rates, share = [value.item() for value in step._table.values]
        assert rates[0] == step.optimizer.param_groups[0]["lr"].item() == pytest.approx(scale * lr)
        assert share == pytest.approx(step.average.share(number))
        assert step.lr == lr

    step.warm_up(images, labels)
    takes_its_row()
    takes_its_row()
    saved = copy.deepcopy(step.state_dict())
    step.measure_seconds(images, labels)  # 21 steps of a schedule of 20
    takes_its_row()
    assert len(captures) == 1
    step.load_state_dict(saved)
    step.max_lr /= 2
    takes_its_row()
    step.max_lr /= 2  # without loading anything
    takes_its_row()
    saved["scheduler"]["step"] = 18
    step.load_state_dict(saved)
    step.measure_seconds(images, labels)
    takes_its_row()
    takes_its_row()
    with pytest.raises(ValueError, match="past the schedule"):
        step(images, labels)


class Operations(TorchDispatchMode):
    """Lists the operations that compute something: no views, no allocations, no marks for a profiler."""

    FREE = ("aten.empty", "aten.empty_like", "aten._unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if not func.is_view and name.rpartition(".")[0] not in self.FREE and not name.startswith("profiler."):
            self.names.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name, most", [("speedrun", 166), ("default", 125), ("fast", 128)])
def test_a_step_takes_few_operations(name: str, most: int, monkeypatch) -> None:
    """163, 122 and 125 with torch 2.13. On a GPU, every one of them costs a launch or more."""
    monkeypatch.setattr(conv, "has_amx", lambda: False)  # a GPU has none
    torch.manual_seed(0)
    step, (images, labels) = step_of(PRESETS[name], precision="bf16"), batch()
    step(images, labels)  # allocates the optimizer's state
    with Operations() as operations:
        step(images, labels)
    assert len(operations.names) <= most, Counter(operations.names).most_common()


@pytest.mark.parametrize("name", ["speedrun", "default", "fast"])
def test_for_a_captured_step_the_host_only_replays(name: str, monkeypatch) -> None:
    def capture(works, images, labels):
        for work in works:
            work(images, labels)
        return [lambda *_, work=work: replayed.append(work.keywords["phase"]) for work in works]

    monkeypatch.setattr(step_module, "capture", capture)
    recipe, replayed = dataclasses.replace(PRESETS[name], width=4), []
    step, (images, labels) = step_of(recipe, precision="bf16", cuda_graph=True), batch()
    step.warm_up(images, labels)
    with Operations() as operations:
        step(images, labels)
    assert replayed == [step.recipe.phase(0, step.total_steps)] and operations.names == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_restored_step_goes_on_where_the_captured_one_stood_on_a_gpu(precision: str) -> None:
    device = torch.device("cuda")
    images, labels = batch(device, count=64)
    step, other = (build(precision, device, cuda_graph=True, ema_epochs=1.0) for _ in range(2))
    for _ in range(3):
        step(images, labels)
    other(images, labels)  # has its own capture, which the restored state must not replay
    weights, state = copy.deepcopy((step.eval_model.state_dict(), step.state_dict()))
    other.eval_model.load_state_dict(weights)
    other.load_state_dict(state)
    step.take_metrics()
    other.take_metrics()
    for _ in range(3):
        step(images, labels)
        other(images, labels)
    assert other.step == step.step == 6 and other.lr == step.lr
    assert other.take_metrics()[0] == pytest.approx(step.take_metrics()[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compile_mode"),
    [("bf16", None), ("fp16", None), pytest.param("bf16", "default", marks=COMPILES)],
)
def test_a_replayed_step_has_the_losses_of_an_eager_one_over_fifty_steps(precision, compile_mode) -> None:
    device, losses = torch.device("cuda"), []
    torch.backends.cudnn.benchmark = False
    images, labels = batch(device, count=64)
    for graph in (False, True):
        torch.manual_seed(0)
        step = step_of(Recipe(), total_steps=50, device=device, precision=precision, cuda_graph=graph)
        if graph and compile_mode:
            step.compile(compile_mode)
        losses.append([])
        for shift in range(50):
            step(images.roll(shift, 0), labels.roll(shift, 0))
            losses[-1].append(step.take_metrics()[0])
    # Kernels round differently. What can be learned by heart does not magnify that.
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[1][-1] < 0.5 * losses[1][0]


@pytest.mark.gpu
@pytest.mark.parametrize("compile_mode", [None, pytest.param("default", marks=COMPILES)])
def test_memory_stays_flat_and_nothing_is_compiled_or_captured_again(compile_mode, monkeypatch) -> None:
    device = torch.device("cuda")
    step = build("bf16", device, compile_mode, cuda_graph=True)
    images, labels = batch(device, count=64)
    step.warm_up(images, labels)
    step(images, labels)
    monkeypatch.setattr(step_module, "capture", lambda *_: pytest.fail("captured again"))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step.take_metrics()
    before = torch.cuda.memory_allocated()
    for _ in range(15):
        step(images, labels)
        step.take_metrics()
    assert torch.cuda.memory_allocated() == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compile_mode", "cuda_graph", "optimizer"),
    [
        ("bf16", None, False, "adamw"),
        ("bf16", None, True, "adamw"),
        ("fp16", None, False, "adamw"),
        ("fp16", None, True, "adamw"),  # its update is outside the graph
        ("bf16", None, False, "muon"),
        ("bf16", None, True, "muon"),
        pytest.param("bf16", "default", True, "adamw", marks=COMPILES),
    ],
)
def test_a_step_never_waits_for_the_gpu(
    precision: str, compile_mode: str | None, cuda_graph: bool, optimizer: str
) -> None:
    device = torch.device("cuda")
    fields = {"ema_epochs": 1.0, "bn_bias_lr_scale": 4.0, "optimizer": optimizer}
    step = build(precision, device, compile_mode, cuda_graph, **fields)
    images, labels = batch(device, count=64)
    step.warm_up(images, labels)
    step(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(images, labels)
            step.peek_metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):  # the first asks for the copy that the second finds
        torch.cuda.synchronize()
        step.peek_metrics()
    torch.cuda.synchronize()
    assert step.peek_metrics() == pytest.approx(step.take_metrics())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compile_mode"),
    [("bf16", None), ("fp16", None), pytest.param("bf16", "default", marks=COMPILES)],
)
def test_the_captured_steps_of_both_resolutions_have_the_losses_of_eager_ones(
    precision, compile_mode
) -> None:
    device, losses = torch.device("cuda"), []
    images, labels = batch(device, count=64)
    for graph in (False, True):
        torch.manual_seed(0)
        recipe = Recipe(early_scale=0.5, early_share=0.15)  # 3 of 20 steps
        settings = {"device": device, "precision": precision, "cuda_graph": graph}
        step = step_of(recipe, max_lr=0.001, **settings)  # higher, and rounding grows from step to step
        if graph and compile_mode:
            step.compile(compile_mode)
        step.warm_up(images, labels)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses.append([])
        for _ in range(6):
            step(images, labels)
            losses[-1].append(step.take_metrics()[0])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_an_overflow_in_fp16_skips_the_step_and_lowers_the_scale(device: torch.device) -> None:
    step = build("fp16", device, width=4)
    images, labels = batch(device)
    before = [p.clone() for p in step.model.parameters()]
    scale = 2.0**40  # fits into the loss's float32, and its gradients do not into float16
    step.scaler.load_state_dict(step.scaler.state_dict() | {"scale": scale})
    step(images, labels)
    assert step.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, b) for p, b in zip(step.model.parameters(), before, strict=True))
    assert step.diverged() is None
