import torch

from fasttrain.system import rng

CPU = torch.device("cpu")


def test_fork_rng_puts_the_generators_back() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with rng.fork_rng(CPU):
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)
