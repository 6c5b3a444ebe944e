"""The networks: CustomResNet, which is the assignment's, and CompactNet; and what they cost.

Shape suffixes: N images, C channels, H rows, W columns, K classes, P pixels of a patch times channels,
R and S its rows and columns.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.conv import Conv3x3
from fasttrain.data.dataset import Dataset
from fasttrain.recipe import Recipe

EPOCH_IMAGES = 50_000
"""CIFAR-10's training images, for the cost of an epoch."""

POOLED_STEM_FROM = 128
"""Resolution from which the first block pools too; otherwise an image would cost four times as much."""

WHITENING_PIXELS = 2_000 * 32**2
"""Pixels of the training images that a CompactNet's first layer is derived from: 2,000 images of CIFAR-10."""

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
    layers: list[nn.Module] = [Conv3x3(in_channels, out_channels)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    norm = BatchNorm2d(out_channels, momentum=bn_momentum)
    return [*layers, norm, _activation(activation), nn.Dropout(dropout)]


def _activation(name: Activation) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.GELU()


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


class ImageClassifier(nn.Module):
    """What the networks have in common: they take pixels, which they normalise themselves, and return logits.

    So a checkpoint includes its preprocessing, loaders move one byte per channel, and a compiler can fuse the
    normalisation.
    Takes images_NCHW (N, 3, resolution, resolution), pixels from 0 to 255 as uint8 or any floating point, and
    returns logits_NK (N, num_classes). The parameters do not depend on the resolution, so a network can train
    on another one for a while (a recipe's early_scale).
    resolution: pixels of an image's side, at least 16.
    classes: names in the order of the logits, known of a network from a checkpoint.
    mean, std: those of the training images per channel, for pixels from 0 to 1.
    logit_scale: factor for the last layer's outputs; a buffer like mean and std, so that the logits follow
    from the state dict.
    Parameters are float32 in channels_last; for half precision, run the network under autocast.
    """

    mean: Tensor
    inverse_std: Tensor
    logit_scale: Tensor
    classes: tuple[str, ...] = ()

    def __init__(
        self, *, resolution: int, mean: Sequence[float], std: Sequence[float], logit_scale: float
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("inverse_std", 1 / (255 * torch.tensor(std)))
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale)))

    def train_first_layer(self, is_trained: bool) -> None:
        """Train what can be trained of a first layer that is fixed otherwise, or leave it as it is."""

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
        raise NotImplementedError


class CustomResNet(ImageClassifier):
    """A nine-layer residual network, designed for 32x32 images: 6,573,130 parameters with ten classes.

    width: channels of the first convolution; the others have two, four and eight times as many.
    resolution: the last pooling spans what remains of the image: an eighth of its side or, from 128 pixels
    on, where the first block pools too, a sixteenth.
    activation: the one after every BatchNorm; gelu is smooth (arXiv:1606.08415).
    init: dirac makes the first filters of every convolution, one per input channel, pass the input through.
    bn_momentum: share of a batch in BatchNorm's running statistics.
    Source: the assignment's table; the layout follows the ResNet-9 of D. Page, "How to Train Your ResNet".
    """

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
        super().__init__(resolution=resolution, mean=mean, std=std, logit_scale=logit_scale)

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
            _init_dirac(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward_normalized(self, images_NCHW: Tensor) -> Tensor:
        x = self.prep(images_NCHW)
        x = self.layer1(x)
        x = x + self.res1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = x + self.res2(x)
        return self.fc(self.pool(x).flatten(1)) * self.logit_scale


class CompactNet(ImageClassifier):
    """Six convolutions behind a fixed first layer, no residual sums: 1,972,802 parameters with ten classes.

    A third of CustomResNet's arithmetic. The first layer's filters are not trained: they are the principal
    components of the training images' patches of 2x2 pixels, scaled to the same variance, and their negatives
    (see `whiten`), so that what the convolutions see is uncorrelated.
    width: channels of the first two convolutions; the others have four times as many.
    resolution: from 128 pixels on the patches do not overlap, which halves the image's side.
    activation, init, bn_momentum: as in CustomResNet.
    Source: cifar10-airbench's network, after tysam-code's hlb-CIFAR10; whitening is D. Page's.
    """

    PATCH = 2
    """Pixels of the side of a patch."""

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
        super().__init__(resolution=resolution, mean=mean, std=std, logit_scale=logit_scale)

        def group(in_channels: int, out_channels: int) -> nn.Sequential:
            settings: Any = {"dropout": dropout, "bn_momentum": bn_momentum, "activation": activation}
            return nn.Sequential(
                *_block(in_channels, out_channels, pool=True, **settings),
                *_block(out_channels, out_channels, pool=False, **settings),
            )

        components = 3 * self.PATCH**2
        stride = self.PATCH if resolution >= POOLED_STEM_FROM else 1
        self.whitening = nn.Conv2d(3, 2 * components, self.PATCH, stride=stride)
        self.whitening_activation = _activation(activation)
        self.group1 = group(2 * components, width)
        self.group2 = group(width, 4 * width)
        self.group3 = group(4 * width, 4 * width)
        self.pool = GlobalMaxPool2d()
        self.fc = nn.Linear(4 * width, num_classes)
        if init == "dirac":
            _init_dirac(self)
        self.whitening.weight.requires_grad_(False)
        nn.init.dirac_(self.whitening.weight)
        self.whitening.bias = nn.Parameter(torch.zeros(2 * components))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as above

    @torch.no_grad()
    def whiten(self, images_NHWC: np.ndarray) -> None:
        """Set the first layer's filters from training images, uint8."""
        images_NCHW = self.normalize(torch.tensor(images_NHWC).permute(0, 3, 1, 2))
        # Views and one copy. F.unfold takes seven times as long, and its threads meet after every image: on
        # busy cores that took a minute.
        patches_NCHWRS = images_NCHW.unfold(2, self.PATCH, 1).unfold(3, self.PATCH, 1)
        patches_PX = patches_NCHWRS.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
        covariance_PP = (patches_PX @ patches_PX.T / patches_PX.shape[1]).double()
        variances_P, components_PP = torch.linalg.eigh(covariance_PP)
        filters_PP = components_PP.T / (variances_P + 5e-4).sqrt()[:, None]
        filters_FCHW = filters_PP.unflatten(1, (3, self.PATCH, self.PATCH))
        self.whitening.weight.copy_(torch.cat([filters_FCHW, -filters_FCHW]))

    def train_first_layer(self, is_trained: bool) -> None:
        assert self.whitening.bias is not None
        self.whitening.bias.requires_grad_(is_trained)  # without it, its output needs no gradient either

    def forward_normalized(self, images_NCHW: Tensor) -> Tensor:
        x = self.whitening_activation(self.whitening(images_NCHW))
        x = self.group3(self.group2(self.group1(x)))
        return self.fc(self.pool(x).flatten(1)) * self.logit_scale


@torch.no_grad()
def _init_dirac(model: nn.Module) -> None:
    """Set the Dirac filters after the default initialisation, so that no other weight depends on them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight[: module.in_channels])


def build_model(
    recipe: Recipe,
    num_classes: int,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    images_NHWC: np.ndarray | None = None,
) -> ImageClassifier:
    """Build the network of a recipe. Networks are built only here, so that no setting gets lost.

    mean, std: as ImageClassifier takes them. images_NHWC: training images, uint8, some of which a CompactNet
    derives its first layer from. Loaded weights include all three.
    The weights are initialised with torch's global generator.
    """
    network = {"resnet": CustomResNet, "compact": CompactNet}[recipe.network]
    model = network(
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
    if images_NHWC is not None and isinstance(model, CompactNet):
        count = max(WHITENING_PIXELS // recipe.resolution**2, 1)
        every = -(-len(images_NHWC) // count)  # from all over the set: a folder's images are sorted by class
        model.whiten(images_NHWC[::every])
    return model


def build_model_for(dataset: Dataset, recipe: Recipe) -> ImageClassifier:
    """Build the untrained network of a recipe, with the statistics of the training images it will see."""
    return build_model(
        recipe,
        len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        images_NHWC=dataset.train.images,
    )


def image_shape(resolution: int) -> tuple[int, int, int, int]:
    """Return the shape of a batch of one image."""
    return 1, 3, resolution, resolution


def multiply_adds(model: ImageClassifier, resolution: int | None = None) -> int:
    """Count the multiply-adds of the convolutions and the linear layer for one image's forward pass.

    resolution: pixels of the image's side; by default the model's.
    """
    return sum(count for _, count in _layers(model, resolution))


def training_flop_per_image(model: ImageClassifier, resolution: int | None = None) -> int:
    """Count the floating-point operations of training on one image; resolution: as in multiply_adds.

    Two for each multiply-add of the forward pass, and four for the gradients of a layer's inputs and weights,
    which a layer that is not trained does not need.
    """
    return sum(count * (6 if is_trained else 2) for is_trained, count in _layers(model, resolution))


def mean_flop_per_image(model: ImageClassifier, recipe: Recipe, total_steps: int) -> float:
    """Return the floating-point operations of training on one image, the mean over all steps of a run."""
    counts = Counter(recipe.training_resolution(step, total_steps) for step in range(total_steps))
    return sum(n * training_flop_per_image(model, size) for size, n in counts.items()) / total_steps


def _layers(model: ImageClassifier, resolution: int | None) -> list[tuple[bool, int]]:
    """Return for each convolution and linear layer whether it is trained, and its multiply-adds per image."""
    layers: list[tuple[bool, int]] = []
    probe = copy.deepcopy(model).to("meta").eval()

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        positions = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        layers.append((module.weight.requires_grad, module.weight.numel() * positions))

    for module in probe.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    dtype = next(probe.parameters()).dtype
    probe(torch.empty(image_shape(resolution or model.resolution), dtype=dtype, device="meta"))
    return layers
