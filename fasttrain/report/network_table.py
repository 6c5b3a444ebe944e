"""The network layer by layer, the shape after every block, its cost, and the least time of an epoch."""

import copy

import torch
from torch import nn

from fasttrain.model import (
    EPOCH_IMAGES,
    CompactNet,
    CustomResNet,
    ImageClassifier,
    image_shape,
    multiply_adds,
    training_flop_per_image,
)
from fasttrain.system.machine import describe, hardware_name
from fasttrain.system.precision import DTYPES, pick_precision
from fasttrain.system.rates import measure_matmul_tflops

BLOCKS: dict[type, list[tuple[str, str, str]]] = {
    CustomResNet: [
        ("PrepLayer", "after", "prep"),
        ("Layer 1, X", "after", "layer1"),
        ("Layer 1, R1", "after", "res1"),
        ("Layer 1, X + R1", "before", "layer2"),
        ("Layer 2", "after", "layer2"),
        ("Layer 3, X", "after", "layer3"),
        ("Layer 3, R2", "after", "res2"),
        ("Layer 3, X + R2", "before", "pool"),
        ("Max Pooling", "after", "pool"),
        ("Reshape before FC", "before", "fc"),
        ("After FC", "after", "fc"),
    ],
    CompactNet: [
        ("Whitening", "after", "whitening"),
        ("Group 1", "after", "group1"),
        ("Group 2", "after", "group2"),
        ("Group 3", "after", "group3"),
        ("Max Pooling", "after", "pool"),
        ("After FC", "after", "fc"),
    ],
}
"""Of each network: a block's name (the assignment's, for CustomResNet), and the module before or after which
its shape is taken. A residual sum is not a module: its shape is that of the next module's input."""


def epoch_floor(model: ImageClassifier, device: torch.device) -> str:
    """Return a sentence with the least time that an epoch can take, at this device's measured matmul rate."""
    precision = pick_precision("auto", device)
    tflops = measure_matmul_tflops(device, DTYPES[precision])
    seconds = training_flop_per_image(model) * EPOCH_IMAGES / (tflops * 1e12)
    return (
        f"At the {tflops:.3g} TFLOP/s of {precision} matmul just measured on "
        f"{hardware_name(describe(device))}, these FLOP take {seconds:.3g} s an epoch by themselves."
    )


def block_shapes(model: ImageClassifier) -> list[tuple[str, tuple[int, ...]]]:
    """Return the shape after every block for one image, with the blocks' names."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    probe = copy.deepcopy(model).to("meta").eval()

    def before(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, inputs: shapes.append((name, tuple(inputs[0].shape))))

    def after(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, output: shapes.append((name, tuple(output.shape))))

    for name, place, module in BLOCKS[type(model)]:
        {"before": before, "after": after}[place](probe.get_submodule(module), name)
    probe(torch.empty(image_shape(model.resolution), device="meta"))
    return shapes


def summary(model: ImageClassifier) -> str:
    """Return the assignment's summary (all layers, totals, the shape after every block) and the cost."""
    import torchinfo

    with torch.random.fork_rng():  # torchinfo takes its input from the global generator
        table = torchinfo.summary(
            copy.deepcopy(model).cpu(),
            input_size=image_shape(model.resolution),
            col_names=("input_size", "kernel_size", "output_size", "num_params", "trainable"),
            col_width=16,
            verbose=0,
        )
    # torchinfo 1.8 prints the name of an enum in its footer: keep the table, and print the totals here.
    body = str(table).split("\nTotal params:")[0].rstrip("=\n")
    rule = body.splitlines()[0]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        body,
        rule,
        f"Total params: {table.total_params:,}",
        f"Trainable params: {trainable:,}",
        f"Non-trainable params: {table.total_params - trainable:,}",
        f"Total mult-adds (M): {table.total_mult_adds / 1e6:.2f}",
        f"Input size (MB): {table.total_input / 1e6:.2f}",
        f"Forward/backward pass size (MB): {table.total_output_bytes / 1e6:.2f}",
        f"Params size (MB): {table.total_param_bytes / 1e6:.2f}",
        f"Estimated Total Size (MB): "
        f"{(table.total_input + table.total_output_bytes + table.total_param_bytes) / 1e6:.2f}",
        rule,
        "",
    ]
    for name, shape in block_shapes(model):
        lines.append(f"{name:<20}{list(shape)}")
    flop = training_flop_per_image(model)
    lines += [
        rule,
        f"Mult-adds per image, forward: {multiply_adds(model):,}",
        f"Training FLOP per image: {flop / 1e9:.3f} G",
        f"Training FLOP per epoch of {EPOCH_IMAGES:,} images: {flop * EPOCH_IMAGES / 1e12:.1f} T",
        "Counted: only the convolutions and the linear layer, two FLOP per mult-add; training takes three",
        "times the forward pass: for the outputs, the gradients of the inputs and those of the weights.",
        rule,
    ]
    return "\n".join(lines)
