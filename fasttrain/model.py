"""CustomResNet: the network, its shape table, and its cost.

Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.recipe import Recipe

EPOCH_IMAGES = 50_000
"""CIFAR-10's training images, for the cost of an epoch."""

POOLED_STEM_FROM = 128
"""Resolution from which the first block pools too; otherwise an image would cost four times as much."""

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""Statistics of a network that has not been given those of its training images."""

Activation = Literal["relu", "gelu"]


def _block(
    in_channels: int,
    out_channels: int,
    *,
    pool: bool,
    dropout: float,
    bn_momentum: float,
    activation: Activation,
) -> list[nn.Module]:
    """Return convolution, max pooling (if asked for), BatchNorm, activation and dropout.

    Pooling comes before BatchNorm and the activation, so that these process a quarter of the elements.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    norm = BatchNorm2d(out_channels, momentum=bn_momentum)
    return [*layers, norm, nn.ReLU(inplace=True) if activation == "relu" else nn.GELU(), nn.Dropout(dropout)]


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that does not count its batches: that takes a launch, and a fixed momentum needs no count.

    The counter stays in the state dict as it was loaded, so that checkpoints keep their keys.
    """

    def forward(self, images_NCHW: Tensor) -> Tensor:
        assert self.momentum is not None
        return F.batch_norm(
            images_NCHW,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class GlobalMaxPool2d(nn.Module):
    """The maximum of each channel, for any resolution: (N, C, H, W) to (N, C, 1, 1)."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        # Not nn.AdaptiveMaxPool2d: on a GPU its gradient is summed in no fixed order.
        return F.max_pool2d(images_NCHW, images_NCHW.shape[2:])


class CustomResNet(nn.Module):
    """A nine-layer residual network, designed for 32x32 images: 6,573,130 parameters with ten classes.

    Takes images_NCHW (N, 3, resolution, resolution), pixels from 0 to 255 as uint8 or any floating point, and
    returns logits_NK (N, num_classes). The network normalises the pixels itself, so that a checkpoint
    includes its preprocessing, loaders move one byte per channel, and a compiler can fuse the normalisation.
    width: channels of the first convolution; the others have two, four and eight times as many.
    resolution: pixels of an image's side, at least 16. The last pooling spans what remains of the image: an
    eighth of its side or, from 128 pixels on, where the first block pools too, a sixteenth. The parameters do
    not depend on it, so the network can train on another resolution for a while (a recipe's
    early_resolution).
    mean, std: those of the training images per channel, for pixels from 0 to 1.
    activation: the one after every BatchNorm; gelu is smooth (arXiv:1606.08415).
    init: dirac makes the first filters of every convolution, one per input channel, pass the input through.
    bn_momentum: share of a batch in BatchNorm's running statistics. logit_scale: factor for the last layer's
    outputs; a buffer like mean and std, so that the logits follow from the state dict.
    Parameters are float32 in channels_last; for half precision, run the network under autocast.
    Source: the assignment's table; the layout follows the ResNet-9 of D. Page, "How to Train Your ResNet".
    """

    mean: Tensor
    inverse_std: Tensor
    logit_scale: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        dropout: float = 0.0,
        *,
        width: int = 64,
        resolution: int = 32,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        activation: Activation = "relu",
        init: Literal["default", "dirac"] = "default",
        bn_momentum: float = 0.1,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("inverse_std", 1 / (255 * torch.tensor(std)))
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))

        def block(in_channels: int, out_channels: int, *, pool: bool) -> list[nn.Module]:
            return _block(
                in_channels,
                out_channels,
                pool=pool,
                dropout=dropout,
                bn_momentum=bn_momentum,
                activation=activation,
            )

        x1, x2, x4, x8 = width, 2 * width, 4 * width, 8 * width
        pooled_stem = resolution >= POOLED_STEM_FROM
        self.prep = nn.Sequential(*block(3, x1, pool=pooled_stem))
        self.layer1 = nn.Sequential(*block(x1, x2, pool=True))
        self.res1 = nn.Sequential(*block(x2, x2, pool=False), *block(x2, x2, pool=False))
        self.layer2 = nn.Sequential(*block(x2, x4, pool=True))
        self.layer3 = nn.Sequential(*block(x4, x8, pool=True))
        self.res2 = nn.Sequential(*block(x8, x8, pool=False), *block(x8, x8, pool=False))
        self.pool = GlobalMaxPool2d()
        self.fc = nn.Linear(x8, num_classes)
        if init == "dirac":
            self._init_dirac()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    @torch.no_grad()
    def _init_dirac(self) -> None:
        """Set the Dirac filters after the default initialisation, so that no other weight depends on them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight[: module.in_channels])

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        """Map pixels from 0 to 255 to float32 with mean 0 and standard deviation 1, in channels_last."""
        # A row of pixels at a time: inner loops over just the three channels are 30 times slower on a CPU.
        width = images_NCHW.shape[3]
        rows_NHX = images_NCHW.permute(0, 2, 3, 1).flatten(2).float()
        rows_NHX = (rows_NHX - self.mean.repeat(width)).mul_(self.inverse_std.repeat(width))
        return rows_NHX.unflatten(2, (width, -1)).permute(0, 3, 1, 2)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.forward_normalized(self.normalize(images_NCHW))

    def forward_normalized(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images that are already normalised."""
        x = self.prep(images_NCHW)
        x = self.layer1(x)
        x = x + self.res1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = x + self.res2(x)
        return self.fc(self.pool(x).flatten(1)) * self.logit_scale


def build_model(
    recipe: Recipe, num_classes: int, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> CustomResNet:
    """Build the network of a recipe. Networks are built only here, so that no setting gets lost.

    mean, std: as CustomResNet takes them; loaded weights include their own.
    The weights are initialised with torch's global generator.
    """
    return CustomResNet(
        num_classes,
        recipe.dropout,
        width=recipe.width,
        resolution=recipe.resolution,
        mean=mean,
        std=std,
        activation=recipe.activation,
        init=recipe.init,
        bn_momentum=recipe.bn_momentum,
        logit_scale=recipe.logit_scale,
    )


def image_shape(resolution: int) -> tuple[int, int, int, int]:
    """Return the shape of a batch of one image."""
    return 1, 3, resolution, resolution


def multiply_adds(model: CustomResNet, resolution: int | None = None) -> int:
    """Count the multiply-adds of the convolutions and the linear layer for one image's forward pass.

    resolution: pixels of the image's side; by default the model's.
    A training step takes three times as many (forward, gradients of the input, gradients of the weights), and
    each is two floating-point operations.
    """
    total = 0
    probe = copy.deepcopy(model).to("meta").eval()

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        positions = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        total += module.weight.numel() * positions

    for module in probe.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    probe(torch.empty(image_shape(resolution or model.resolution), device="meta"))
    return total


def training_flop_per_image(model: CustomResNet, resolution: int | None = None) -> int:
    """Count the floating-point operations of training on one image; resolution: as in multiply_adds."""
    return 2 * 3 * multiply_adds(model, resolution)
