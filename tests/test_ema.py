import copy
import math

import pytest
import torch
from torch import nn

from fasttrain.ema import WeightAverage


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))


def follow(values: list[float], horizon: float) -> float:
    """The average after weights that had these values, one a step."""
    model = network()
    average = WeightAverage(model, horizon)
    for step, value in enumerate(values):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_var):
                tensor.fill_(value)
        average.update(average.share(step))
    [found] = {
        round(t.flatten()[0].item(), 4) for t in (*average.model.parameters(), average.model[1].running_var)
    }
    return found


def test_shares_fall_by_e_over_the_horizon_and_sum_to_one() -> None:
    values = [1.0, 5.0, 2.0, 8.0, 3.0]
    shares = [math.exp(-(4 - step) / 3) for step in range(5)]
    expected = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
    assert follow(values, horizon=3) == pytest.approx(expected, abs=1e-3)
    assert follow([7.0], horizon=1000) == 7  # nothing is left of the first weights
    assert follow([7.0, 9.0], horizon=0.01) == 9


def test_only_the_copy_changes_and_it_keeps_its_addresses() -> None:
    model = network()
    average = WeightAverage(model, 10)
    before = copy.deepcopy(model.state_dict())
    addresses = [tensor.data_ptr() for tensor in average.model.state_dict().values()]
    average.update(average.share(3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [tensor.data_ptr() for tensor in average.model.state_dict().values()] == addresses


@pytest.mark.parametrize("share", [1.0, 0.25, 0.001])
def test_a_share_in_a_tensor_means_the_same_as_a_number(share: float) -> None:
    model = network().to(memory_format=torch.channels_last)
    by_number, by_tensor = WeightAverage(model, 10), WeightAverage(model, 10)
    expected = [tensor.clone() for tensor in by_number.tensors]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    by_number.update(share)
    by_tensor.update(torch.tensor(share))
    for old, new, ours, theirs in zip(
        expected, by_number._values, by_number.tensors, by_tensor.tensors, strict=True
    ):
        torch.testing.assert_close(ours, old.lerp(new, share))
        torch.testing.assert_close(theirs, ours)


@pytest.mark.gpu
def test_a_captured_update_takes_the_share_of_its_step() -> None:
    device = torch.device("cuda")
    model = network().to(device)
    average, expected = WeightAverage(model, 2), WeightAverage(model, 2)
    average.update(average.share(0))
    share = torch.ones((), device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update(share)
    average.model.load_state_dict(expected.model.state_dict())
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        share.fill_(average.share(step))
        graph.replay()
        expected.update(expected.share(step))
    for ours, theirs in zip(average.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
