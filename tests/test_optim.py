import dataclasses

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from fasttrain.model import CustomResNet
from fasttrain.optim import build_optimizer, one_cycle, orthogonalize, set_schedule
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


@pytest.mark.parametrize("shape", [(16, 144), (64, 27), (32, 32)])
def test_orthogonalize_keeps_the_directions_and_brings_their_sizes_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    sizes = torch.linspace(1, 0.2, len(right))
    along = left.T @ orthogonalize(left * sizes @ right) @ right.T
    assert along.diag().min() > 0.5 and along.diag().max() < 1.3
    torch.testing.assert_close(along, along.diag().diag(), rtol=0, atol=1e-4)


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
