"""Remedies compute what the network computes."""

import pytest
import torch
from torch import nn

from benchmarks.research.networks import REMEDIES
from fasttrain.model import CustomResNet


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_has_the_networks_parameters_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    plain, other = CustomResNet(width=8), CustomResNet(width=8)
    REMEDIES[name](other)
    other.load_state_dict(plain.state_dict())  # the same parameters under the same names
    images, labels = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (16,))
    gradients = []
    for network in (plain, other):  # in training: the batch's own statistics
        logits = network(images)
        nn.functional.cross_entropy(logits, labels).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(other(images), plain(images), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(plain.buffers(), other.buffers(), strict=True):  # the running statistics
        torch.testing.assert_close(ours, theirs)
