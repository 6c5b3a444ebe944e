"""Every convolution of the network by itself: its three passes' milliseconds, error and kernels.

    python -m benchmarks.layers [--batch-sizes 256 512 1024]

forward, dgrad (the gradient of the input) and wgrad (of the weights), in the precision of a training and in
channels_last. The first convolution also with its 3 channels padded to 4 and 8: with 3, half precision has no
fast kernel. The error is the distance from the same pass in float32, relative to its norm: rounding to bf16
explains about 0.002, and anything near 1 is a wrong kernel, as in pytorch#150700.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness import require_counts, run, save, show
from benchmarks.workloads import network
from fasttrain.recipe import Recipe
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import DTYPES, exact_float32, pick_precision, prepare
from fasttrain.system.rates import best_seconds

PASSES = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time every convolution by itself."""

    batch_sizes: tuple[int, ...] = (256, 512, 1024)
    """Images per call."""
    width: int = 64
    """Channels of the network's first convolution."""
    seconds: float = 0.05
    """Length of a sample, of which the best burst counts."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        require_counts(batch_sizes=min(self.batch_sizes, default=0), width=self.width)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution without a bias, and the side of its square input."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    padding: int
    side: int

    def flop(self, batch_size: int) -> float:
        """Of one pass; the three cost the same."""
        side = self.side + 2 * self.padding - self.kernel + 1
        return 2 * batch_size * side**2 * self.inputs * self.outputs * self.kernel**2


def layers(width: int) -> list[Layer]:
    """The network's convolutions, the first one also with more channels."""
    model, found = network(width=width), []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d) and module.stride == (1, 1) and module.bias is None
        found.append(
            Layer(
                name=name,
                inputs=module.in_channels,
                outputs=module.out_channels,
                kernel=module.kernel_size[0],
                padding=int(module.padding[0]),
                side=inputs[0].shape[2],
            )
        )

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(partial(note, name))
    side = Recipe().resolution
    model.eval()(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    padded = [dataclasses.replace(found[0], inputs=channels) for channels in (4, 8)]
    return [found[0], *padded, *found[1:]]


def tensors(layer: Layer, batch_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Input, weights and the gradient of the output: noise, since a GPU computes faster on zeros."""
    noise = torch.Generator(device).manual_seed(0)
    out_side = layer.side + 2 * layer.padding - layer.kernel + 1
    shapes = (
        (batch_size, layer.inputs, layer.side, layer.side),
        (layer.outputs, layer.inputs, layer.kernel, layer.kernel),
        (batch_size, layer.outputs, out_side, out_side),
    )
    return tuple(
        torch.randn(shape, generator=noise, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )


def passes(
    layer: Layer, inputs: Tensor, weights: Tensor, gradient: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """The three passes, as autograd calls them."""
    settings: Any = ([1, 1], [layer.padding] * 2, [1, 1], False, [0, 0], 1)

    def backward(index: int) -> Tensor:
        mask = [index == 0, index == 1, False]
        return torch.ops.aten.convolution_backward(gradient, inputs, weights, None, *settings, mask)[index]

    return {
        "forward": lambda: torch.ops.aten.convolution(inputs, weights, None, *settings),
        "dgrad": lambda: backward(0),
        "wgrad": lambda: backward(1),
    }


def measure(layer: Layer, batch_size: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row per pass."""
    given = tensors(layer, batch_size, device, DTYPES[pick_precision("auto", device)])
    work, exact = passes(layer, *given), passes(layer, *(tensor.float() for tensor in given))
    rows: list[dict[str, Any]] = []
    for name in PASSES:
        pass_seconds = best_seconds(work[name], device, seconds)
        with exact_float32():
            reference = exact[name]()
        error = ((work[name]().float() - reference).norm() / reference.norm()).item()
        rows.append(
            {
                "layer": layer.name,
                "inputs": layer.inputs,
                "outputs": layer.outputs,
                "side": layer.side,
                "pass": name,
                "batch_size": batch_size,
                "ms": 1000 * pass_seconds,
                "tflops": layer.flop(batch_size) / pass_seconds / 1e12,
                "error": error,
            }
        )
    kernels = kernel_names(work, device)
    return [row | {"kernels": kernels[row["pass"]]} for row in rows]


def kernel_names(work: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, list[str]]:
    """What runs on the device in each of these calls; on a CPU the operators, which are all it lists."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for name, call in work.items():
            with record_function(name):
                call()
        if on_gpu:
            torch.cuda.synchronize(device)
    names: dict[str, list[str]] = {name: [] for name in work}
    for event in profiler.events() or []:
        ancestor = event
        while ancestor.cpu_parent is not None:
            ancestor = ancestor.cpu_parent
        if event.device_type == DeviceType.CPU and ancestor is not event and ancestor.name in names:
            names[ancestor.name] += [kernel.name for kernel in event.kernels] if on_gpu else [event.name]
    return names


def main(options: Options) -> None:
    device = pick_device(options.device)
    prepare(device, "auto")
    rows: list[dict[str, Any]] = []
    path = Path()
    for batch_size in options.batch_sizes:
        for layer in layers(options.width):
            rows += measure(layer, batch_size, device, options.seconds)
        # If this is stopped, the smaller batches are saved.
        path = save("layers", device, {"width": options.width, "rows": rows})
    show(
        "convolutions, one pass each",
        ["layer", "channels", "side", "pass", "batch", "ms", "TFLOP/s", "error"],
        [
            [
                row["layer"],
                f"{row['inputs']}-{row['outputs']}",
                str(row["side"]),
                row["pass"],
                str(row["batch_size"]),
                f"{row['ms']:.3f}",
                f"{row['tflops']:.3g}",
                f"{row['error']:.1e}",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
