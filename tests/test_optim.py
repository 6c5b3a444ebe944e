import dataclasses

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.model import CustomResNet
from fasttrain.optim import (
    ScheduleTable,
    build_optimizer,
    newton_schulz,
    one_cycle,
    orthogonalize,
    plan_stacks,
    set_schedule,
)
from fasttrain.recipe import PRESETS, Recipe


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("total_steps", [11, 97 * 24])  # torch's own divides by zero where a peak is step 0
def test_the_schedule_is_torchs_one_cycle(name: str, total_steps: int) -> None:
    recipe = PRESETS[name]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = OneCycleLR(
        optimizer,
        max_lr=0.02,
        total_steps=total_steps,
        pct_start=recipe.pct_start,
        anneal_strategy="linear",
        three_phase=False,
        cycle_momentum=recipe.cycle_momentum,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
    )
    for step in range(total_steps):
        lr, beta1 = one_cycle(step, total_steps, 0.02, recipe)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        if recipe.cycle_momentum:
            assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-12)
        else:
            assert beta1 is None
        optimizer.step()
        if step < total_steps - 1:
            reference.step()


def test_the_assignment_peaks_at_epoch_5_and_is_not_annihilated() -> None:
    recipe = PRESETS["assignment"]
    rates = [one_cycle(step, 97 * 24, 1.0, recipe)[0] for step in range(97 * 24)]
    assert rates.index(max(rates)) + 1 == 97 * 5 and max(rates) == 1
    assert rates[-1] == pytest.approx(rates[0])


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 5])
def test_the_schedule_holds_for_runs_of_a_few_steps(total_steps: int) -> None:
    for pct_start in (0.2, 0.25, 0.5, 0.99):
        recipe = dataclasses.replace(PRESETS["default"], pct_start=pct_start)
        assert all(0 <= one_cycle(step, total_steps, 1.0, recipe)[0] <= 1 for step in range(total_steps))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_only_weights_of_convolutions_and_linear_layers_decay(kind) -> None:
    model = CustomResNet()
    optimizer = build_optimizer(model, Recipe(optimizer=kind, weight_decay=0.1), lr=0.01)
    assert type(optimizer).__name__.lower() == kind
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0), name


def test_set_schedule_reaches_every_group() -> None:
    optimizer = build_optimizer(CustomResNet(), Recipe(), lr=0.01)
    set_schedule(optimizer, 0.5, 0.9)
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.5, (0.9, 0.999))] * 2
    set_schedule(optimizer, 0.25, None)
    assert [(group["lr"], group["betas"][0]) for group in optimizer.param_groups] == [(0.25, 0.9)] * 2


def test_biases_of_batch_norm_learn_at_their_own_multiple_of_the_rate() -> None:
    model = CustomResNet(width=8)
    optimizer = build_optimizer(model, Recipe(bn_bias_lr_scale=4.0, weight_decay=0.1), lr=0.01)
    set_schedule(optimizer, 0.5, None)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert (
        len(groups) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    )
    biases = {id(m.bias) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert len(biases) == 8
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group["lr"] == (2.0 if id(parameter) in biases else 0.5), name
        assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0), name


def test_orthogonalize_keeps_the_directions_and_brings_their_sizes_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 144), (64, 27), (32, 32), (16, 144), (16, 100)]
    parts = [
        torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False) for shape in shapes
    ]
    matrices = [left * torch.linspace(1, 0.2, len(right)) @ right for left, _, right in parts]
    for (left, _, right), result in zip(parts, orthogonalize(matrices, -2.0), strict=True):
        along = left.T @ result @ right.T / -2
        assert along.diag().min() > 0.5 and along.diag().max() < 1.3
        torch.testing.assert_close(along, along.diag().diag(), rtol=0, atol=1e-4)


def test_four_stacks_hold_the_networks_filters_for_one_percent_more_work() -> None:
    shapes = tuple((len(p), p[0].numel()) for p in CustomResNet().parameters() if p.dim() == 4)
    prep, layer1, *res1, layer2, layer3, res2_0, res2_1 = range(8)
    stacks = plan_stacks(shapes)
    assert stacks == [[res2_0, res2_1], [layer3], [layer2], [*res1, layer1, prep]]

    def flop(*stacks: tuple[int, int, int]) -> int:
        with FlopCounterMode(display=False) as counter:
            for stack in stacks:
                newton_schulz(torch.empty(stack, device="meta"))
        return counter.get_total_flops()

    padded = flop(*((len(stack), *shapes[stack[0]]) for stack in stacks))
    assert 1 < padded / flop(*((1, *shape) for shape in shapes)) < 1.01


def test_muon_renews_a_share_of_the_filters_and_leaves_the_rest_to_adamw() -> None:
    recipe = Recipe(optimizer="muon", bn_bias_lr_scale=4.0, muon_lr_scale=10.0, weight_decay=0.1)
    model, twin = CustomResNet(width=8), CustomResNet(width=8)
    twin.load_state_dict(model.state_dict())
    muon = build_optimizer(model, recipe, lr=0.01)
    adamw = build_optimizer(twin, dataclasses.replace(recipe, optimizer="adamw"), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=generator)
        theirs.grad = ours.grad.clone()
    for optimizer in (muon, adamw):
        set_schedule(optimizer, 0.02, None)
        optimizer.step()
    for ours, theirs, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        if ours.dim() != 4:
            assert torch.equal(ours, theirs)
            continue
        rows = len(ours)
        unit = old * rows**0.5 / old.norm()
        step = (unit - ours).flatten(1) / (0.02 * 10)
        values = torch.linalg.svdvals(step)
        assert values.max() < 1.3 and values.median() > 0.5
        assert (step * ours.grad.flatten(1)).sum() > 0  # downhill
    assert len(muon.state) == len(adamw.state) == len(before)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_muon_turns_round_once_the_new_gradient_outweighs_the_momentum(share: float) -> None:
    """A gradient, then `share` of it the other way: 0.6 of the first is left, seen 0.6 of a step ahead."""
    model = CustomResNet(width=8)
    muon = build_optimizer(model, Recipe(optimizer="muon"), lr=0.01)
    filters = model.res1[0].weight
    first = torch.randn(filters.shape, generator=torch.Generator().manual_seed(0))
    filters.grad = first
    muon.step()
    unit = filters.detach() * len(filters) ** 0.5 / filters.detach().norm()
    filters.grad = -share * first
    muon.step()
    downhill = ((unit - filters.detach()) * first).sum().item()
    assert (downhill > 0) == (0.36 - 1.6 * share > 0)


def plain_muon(
    filters_FCHW: torch.Tensor, momentum_FCHW: torch.Tensor, gradient_FCHW: torch.Tensor, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One convolution's filters and momentum after a step, as one would write the method down."""
    momentum_FCHW = 0.6 * momentum_FCHW + gradient_FCHW
    x = (gradient_FCHW + 0.6 * momentum_FCHW).flatten(1)
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    scaled = filters_FCHW * len(filters_FCHW) ** 0.5 / filters_FCHW.norm()
    return scaled - lr * x.view_as(filters_FCHW), momentum_FCHW


@pytest.mark.parametrize("rate_is_tensor", [False, True])
@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 5e-3)]
)
def test_muon_is_the_plain_method_in_float64(dtype: torch.dtype, error: float, rate_is_tensor: bool) -> None:
    """Over four steps. error: norm of the difference, as a share of the way that the filters have gone."""
    torch.manual_seed(0)
    model = CustomResNet(width=8)
    muon = build_optimizer(model, Recipe(optimizer="muon", muon_lr_scale=10.0), lr=0.01)
    layers = [p for p in model.parameters() if p.dim() == 4]
    plain = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in layers]
    starts = [filters * len(filters) ** 0.5 / filters.norm() for filters, _ in plain]
    for step in range(4):
        lr = 0.005 * (step + 1)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        plain = [plain_muon(*state, p.grad.double(), 10 * lr) for p, state in zip(layers, plain, strict=True)]
        set_schedule(muon, lr, None)
        if rate_is_tensor:
            muon.param_groups[-1]["lr"] = torch.tensor(10 * lr)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            muon.step()
    for ours, (reference, momentum), start in zip(layers, plain, starts, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours - reference).norm() < error * (reference - start).norm()
        torch.testing.assert_close(muon.state[ours]["momentum"].double(), momentum, rtol=1e-5, atol=1e-9)


def test_muon_leaves_filters_without_a_gradient_alone_and_takes_any_layout() -> None:
    torch.manual_seed(0)
    models = [CustomResNet(width=8) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.contiguous_format)
    frozen = models[0].prep[0].weight.detach().clone()
    for model in models:
        muon = build_optimizer(model, Recipe(optimizer="muon"), lr=0.01)
        muon.step()  # no gradient at all
        generator = torch.Generator().manual_seed(0)
        for parameter in list(model.parameters())[1:]:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(memory_format=torch.preserve_format)
        muon.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(models[0].prep[0].weight, frozen)


def test_a_table_gives_each_steps_values_and_stays_at_its_last_row() -> None:
    table = ScheduleTable([[1.0, 0.1], [2.0, 0.2], [3.0, 0.3]], 1, torch.device("cpu"))
    addresses = [value.data_ptr() for value in table.values]
    read = []
    for _ in range(4):
        table.advance()
        read.append([value.item() for value in table.values])
    assert read == [pytest.approx([n, n / 10]) for n in (2, 3, 3, 3)]
    table.step.fill_(0)
    table.advance()
    assert [value.item() for value in table.values] == pytest.approx([1, 0.1])
    assert [value.data_ptr() for value in table.values] == addresses and table.step.item() == 1
