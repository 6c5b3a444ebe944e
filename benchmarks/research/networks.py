"""The same network, computed in other ways: remedies for slow operators, each beside the network as it is.

    python -m benchmarks.research.networks [--rounds 5] [--batch-size 512]

Each has the same parameters, and the same results but for rounding and for the gradient of a maximum where
values tie. A remedy that pays off belongs in fasttrain/model.py; these did not, or were never measured.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Workload, interleave, run, save, show
from benchmarks.stats import spread
from benchmarks.step import step_ms
from benchmarks.workloads import unchanged, usual_variant
from fasttrain.model import BatchNorm2d, CustomResNet
from fasttrain.system.machine import pick_device

Change = Callable[[CustomResNet], None]
"""Of a network, in place."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time remedies for slow operators."""

    rounds: int = 5
    """Samples of each network, taken in turn."""
    batch_size: int = 512
    """Images per step."""
    width: int = 64
    """Channels of the first convolution."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


class PaddedConv(nn.Conv2d):
    """A convolution of three channels as one of eight, with zeros, which suits tensor cores in NHWC."""

    channels = 8

    def forward(self, x: Tensor) -> Tensor:
        missing = self.channels - self.in_channels
        x = functional.pad(x.permute(0, 2, 3, 1), (0, missing)).permute(0, 3, 1, 2)
        weight = functional.pad(self.weight, (0, 0, 0, 0, 0, missing))
        return functional.conv2d(x, weight, padding=self.padding)


class PaddedConv4(PaddedConv):
    channels = 4


class SlicedPool(nn.Module):
    """Max pooling of two by two as maxima of four slices: no kernel of indices, none of scattered adds."""

    def forward(self, x: Tensor) -> Tensor:
        top = torch.maximum(x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2])
        return torch.maximum(top, torch.maximum(x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]))


class WindowedPool(nn.Module):
    """Max pooling of two by two as one maximum over an axis of windows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))


class TwoStageBatchNorm(nn.BatchNorm2d):
    """BatchNorm's sums over each image first and over the images then: as many sums at once as (N, C) has."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        values, count = x.float(), x.numel() // x.shape[1]
        mean_C = values.mean((2, 3)).mean(0)
        var_C = values.square().mean((2, 3)).mean(0) - mean_C.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C * (count / (count - 1)), self.momentum)
        scale_C = self.weight * (var_C + self.eps).rsqrt()
        shift_C = self.bias - mean_C * scale_C
        return (values * scale_C[:, None, None] + shift_C[:, None, None]).to(x.dtype)


class LibraryBatchNorm(BatchNorm2d):
    """BatchNorm by cuDNN's or torch's own kernel: a compiler leaves it out of what it fuses."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def first_conv(conv: type[PaddedConv]) -> Change:
    def change(model: CustomResNet) -> None:
        model.prep[0].__class__ = conv

    return change


def pools(pooling: type[nn.Module]) -> Change:
    def change(model: CustomResNet) -> None:
        for layer in (model.layer1, model.layer2, model.layer3):
            layer[1] = pooling()

    return change


def norms(norm: type[nn.BatchNorm2d]) -> Change:
    def change(model: CustomResNet) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = norm

    return change


AS_IT_IS = "as it is"

REMEDIES: dict[str, Change] = {
    "first convolution padded to 8 channels": first_conv(PaddedConv),
    "first convolution padded to 4 channels": first_conv(PaddedConv4),
    "pooling by maxima of slices": pools(SlicedPool),
    "pooling by a maximum over windows": pools(WindowedPool),
    "BatchNorm's sums in two stages": norms(TwoStageBatchNorm),
    "BatchNorm left to the library": norms(LibraryBatchNorm),
}


def row(name: str, values: list[float], baseline: list[float]) -> dict[str, Any]:
    """A network's median, and its change against the network as it is, which took turns with it."""
    # Paired by round: a slow minute of the machine hits both.
    change = statistics.median(v / b - 1 for v, b in zip(values, baseline, strict=True))
    return {
        "network": name,
        "step_ms": statistics.median(values),
        "spread": spread(values),
        "change": change,
    }


def main(options: Options) -> None:
    device = pick_device(options.device)

    def timed(change: Change) -> Workload:
        variant = usual_variant(device, change=change, width=options.width)
        return step_ms(variant, options.batch_size, device)

    settings = {"batch_size": options.batch_size, "width": options.width, "rounds": options.rounds}
    as_it_is = timed(unchanged)
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for name, change in REMEDIES.items():
        found = interleave({AS_IT_IS: as_it_is, name: timed(change)}, options.rounds)
        rows.append(row(name, found[name], found[AS_IT_IS]))
        samples[name] = found
        # Each compiles for a while: if this is stopped, those before it are saved.
        path = save("networks", device, settings | {"rows": rows, "samples": samples})
    show(
        f"the same network computed in other ways, batch {options.batch_size}, median of {options.rounds}",
        ["network", "ms per step", "spread", "change"],
        [
            [row["network"], f"{row['step_ms']:,.2f}", f"±{row['spread']:.1%}", f"{row['change']:+.1%}"]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
