"""The training recipe: one frozen dataclass, its checks, and the named presets.

Every default is given once, here. Command-line flags are generated from the fields, `recipe.json` in a run's
folder holds this dataclass, and an error names every unknown key or impossible value.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from fasttrain.errors import UserError

NetworkName = Literal["resnet", "compact"]

LARGEST = 2**31 - 1
"""Of all whole numbers in a recipe: JSON's and Python's have no limit."""

SMALLEST_RESOLUTION = 12
"""Pixels of a side that every network can pool to one."""

Views = Literal["none", "mirror", "shifts"]
"""Views of a test image whose logits are averaged; see Recipe.test_views."""


class Phase(NamedTuple):
    """What sets a training's steps apart: the images' side in pixels, and whether the first layer learns."""

    resolution: int
    trains_first_layer: bool


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training recipe. The defaults are the preset `default`."""

    name: str = "default"
    """Name of the recipe in run folders and results."""
    epochs: int = 24
    """Passes over the training images."""
    batch_size: int = 512
    """Images per step, over all ranks; the last, smaller batch of an epoch is dropped."""
    seed: int = 0
    """Seed of the weights, the order of the images and the augmentation."""

    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """adam: weight decay is added to the gradient. adamw: it is decoupled (arXiv:1711.05101). muon:
    orthogonalised momentum for convolutions, adamw for everything else."""
    max_lr: float | Literal["auto"] = 0.01
    """Peak learning rate of the one-cycle schedule; auto runs the LR finder before the training."""
    weight_decay: float = 0.2
    """Weight decay on convolution and linear weights; with muon only on linear ones. The rest has none."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes (arXiv:1512.00567)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: an image's loss is weighted by the inverse of its class's number of training images."""
    dropout: float = 0.0
    """Dropout after every activation."""

    network: NetworkName = "resnet"
    """resnet: the assignment's, nine layers. compact: six convolutions behind a fixed first layer, a third of
    its arithmetic."""
    width: int = 64
    """Channels of the network's first convolution; the others have up to eight times as many."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation after every BatchNorm; gelu is smooth (arXiv:1606.08415)."""
    init: Literal["default", "dirac"] = "default"
    """dirac: the first filters of every convolution pass its input channels through (arXiv:1706.00388)."""
    first_layer_share: float = 1.0
    """With compact: share of all steps that train the biases of the first layer; a later step is shorter."""
    init_from: str = ""
    """A checkpoint, or a run's folder, to take the weights from; the last layer is new if classes differ."""
    bn_momentum: float = 0.1
    """Share of each batch in BatchNorm's running mean and variance."""
    bn_bias_lr_scale: float = 1.0
    """Learning rate of BatchNorm's biases, as a multiple of the schedule's."""
    muon_lr_scale: float = 10.0
    """With muon: the share of a convolution's weights that a step replaces, over the schedule's rate."""
    logit_scale: float = 1.0
    """Factor for the last layer's outputs."""
    ema_epochs: float = 0.0
    """Evaluate and save an average of the weights over roughly this many last epochs; 0 turns it off."""

    pct_start: float = 5 / 24
    """Share of all steps before the peak of the schedule: 5/24 peaks at epoch 5 of 24."""
    div_factor: float = 25.0
    """First learning rate = max_lr / div_factor."""
    final_div_factor: float = 1000.0
    """Last learning rate = first learning rate / final_div_factor; 1 ends at the first rate."""
    cycle_momentum: bool = False
    """Lower Adam's beta1 from 0.95 to 0.85 while the learning rate rises, and raise it while that falls."""

    resolution: int = 32
    """Width and height of the images in pixels; your own are scaled to it, CIFAR's have 32."""
    early_scale: float = 1.0
    """Scale of the images that the first steps train on: 0.75 shrinks 32 pixels to 24; 1 turns it off."""
    early_share: float = 0.6
    """With early_scale below 1: share of all steps that train on shrunk images."""
    crop_padding: int = 4
    """Reflect-pad by this many pixels, then crop at a random offset; 0 turns it off."""
    flip: bool = True
    """Mirror half of the images; see flip_order."""
    flip_order: Literal["random", "alternating"] = "random"
    """random: a coin toss per image and epoch. alternating: one toss, then in turn (arXiv:2404.00498)."""
    cutout: int = 8
    """Side in pixels of the square that is set to the mean at a random place; 0 turns it off."""
    test_views: Views = "none"
    """After the last epoch, report a second test accuracy, from the mean logits of several views of an image.
    mirror: the image and its mirror image. shifts: half of the weight for these two, half for both of them
    moved by a pixel down and right, and up and left."""

    compute_dtype: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    """Precision of the matrix products; auto takes bf16 if the hardware is fast in it."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = "auto"
    """torch.compile's mode; auto compiles on a GPU if it can pay off within the run, and never on a CPU."""
    cuda_graph: bool = True
    """On an NVIDIA GPU, capture the step once and replay it in one launch; not with several ranks."""
    sync_batchnorm: bool = False
    """With several ranks: compute BatchNorm's statistics over the whole batch, not over each rank's part."""
    loader: Literal["auto", "dali", "tensor"] = "auto"
    """The loader: DALI, or pure torch; auto takes DALI if it is installed."""
    loader_threads: int = 2
    """DALI's worker threads."""

    def __post_init__(self) -> None:
        for field, wanted in get_type_hints(type(self)).items():
            _require_type(field, getattr(self, field), wanted)
        rules: list[tuple[str, bool, str]] = [
            (
                "name",
                re.fullmatch(r"\w[\w .,+@=-]{0,79}", self.name) is not None,
                "up to 80 letters, digits, spaces and characters of -_.,+@=, the first a letter, digit or _: "
                "it becomes part of a folder's name",
            ),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2 (BatchNorm needs two images)"),
            ("seed", self.seed >= 0, "0 or more"),
            ("max_lr", self.max_lr == "auto" or 0 < self.max_lr < float("inf"), "above 0, or auto"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("width", self.width >= 1, "at least 1"),
            ("bn_momentum", 0 < self.bn_momentum <= 1, "above 0, at most 1"),
            ("bn_bias_lr_scale", 0 < self.bn_bias_lr_scale < float("inf"), "above 0"),
            ("muon_lr_scale", 0 < self.muon_lr_scale < float("inf"), "above 0"),
            ("logit_scale", 0 < self.logit_scale < float("inf"), "above 0"),
            ("ema_epochs", 0 <= self.ema_epochs < float("inf"), "0 or more"),
            ("pct_start", 0 < self.pct_start < 1, "between 0 and 1"),
            ("div_factor", 1 <= self.div_factor < float("inf"), "1 or more"),
            ("final_div_factor", 1 <= self.final_div_factor < float("inf"), "1 or more"),
            ("resolution", self.resolution in range(16, 257, 8), "a multiple of 8 from 16 to 256 pixels"),
            ("early_scale", 0.25 <= self.early_scale <= 1, "from 0.25 to 1"),
            ("early_share", 0 < self.early_share < 1, "between 0 and 1"),
            ("first_layer_share", 0 < self.first_layer_share <= 1, "above 0, at most 1"),
            (
                "crop_padding",
                0 <= self.crop_padding <= self.resolution // 2,
                f"from 0 to {self.resolution // 2} pixels, half of --resolution",
            ),
            (
                "cutout",
                0 <= self.cutout <= self.resolution,
                f"from 0 to {self.resolution} pixels, all of --resolution",
            ),
            ("loader_threads", self.loader_threads >= 1, "at least 1"),
        ]
        for field, holds, expected in rules:
            if not holds:
                raise UserError(f"{flag(field)} {getattr(self, field)}: expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and their values, ready for JSON."""
        return dataclasses.asdict(self)

    def training_resolution(self, step: int, total_steps: int) -> int:
        """Return the resolution that a step, counted from 0, trains at; an early one is a multiple of 4."""
        if step >= self.early_share * total_steps:
            return self.resolution
        return min(
            max(4 * round(self.early_scale * self.resolution / 4), SMALLEST_RESOLUTION), self.resolution
        )

    def phase(self, step: int, total_steps: int) -> "Phase":
        """Return what a step, counted from 0, works on."""
        trains_first_layer = step < self.first_layer_share * total_steps
        return Phase(self.training_resolution(step, total_steps), trains_first_layer)

    def phases_from(self, step: int, total_steps: int) -> "list[Phase]":
        """Return the phases of a step and of those after it, each once, in order."""
        return list(dict.fromkeys(self.phase(later, total_steps) for later in range(step, total_steps)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Return the recipe with these fields; missing ones keep their defaults.

        Raises UserError for an unknown key or an impossible value.
        """
        values = with_names_of_today(values)
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise UserError(f"unknown recipe key {key!r}: expected one of {', '.join(fields)}")
        return cls(**values)


def with_names_of_today(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's fields under their present names; those with values of another type stay as they are.

    Until 2026-11-28 the early images' size was given in pixels, and a mirror image was the only other view.
    """
    values = dict(values)
    resolution, pixels = values.get("resolution", Recipe.resolution), values.get("early_resolution")
    if type(pixels) is int and type(resolution) is int and resolution:
        del values["early_resolution"]
        values["early_scale"] = pixels / resolution if pixels else 1.0
    if isinstance(values.get("test_flip"), bool):
        values["test_views"] = "mirror" if values.pop("test_flip") else "none"
    return values


def flag(field: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + field.replace("_", "-")


def _require_type(field: str, value: object, wanted: Any) -> None:
    """Raise UserError unless the value has the field's type; an int is accepted for a float."""
    options = get_args(wanted)
    literals = [option for option in options if isinstance(option, str)]
    for option in options:
        literals += [text for text in get_args(option) if isinstance(text, str)]
    types = [kind for kind in (wanted, *options) if kind in (int, float, bool, str)]
    fits = (isinstance(value, str) and value in literals) or any(
        type(value) is kind or (kind is float and type(value) is int) for kind in types
    )
    if not fits:
        expected = " or ".join([*(kind.__name__ for kind in types), *literals])
        raise UserError(f"{flag(field)} {value!r}: expected {expected}")
    if type(value) is int and abs(value) > LARGEST:
        raise UserError(f"{flag(field)} {value!r:.40}: expected at most {LARGEST}")


# A short schedule: more of what helps when there is little time, small batches for more steps, no cutout and
# a small crop padding, which both need more epochs, and a small logit scale, which keeps AdamW from changing
# the last layer too fast. The cutout was chosen by ablation (python -m benchmarks.accuracy); batch size, crop
# and logit_scale by a few pairs of runs; the weight decay from the number of steps. The other values are
# those of the literature (arXiv:2404.00498): no difference found so far could be distinguished from chance.
_FAST = Recipe(
    name="fast",
    epochs=9,
    batch_size=256,
    weight_decay=0.3,
    label_smoothing=0.2,
    init="dirac",
    bn_bias_lr_scale=4.0,
    logit_scale=0.125,
    ema_epochs=0.5,
    crop_padding=2,
    flip_order="alternating",
    cutout=0,
    test_views="mirror",
)

# `fast` with another optimizer and network than the assignment's, and with smaller images at first. The
# rates were chosen by a few runs each on held-out training images (docs/lab-notebook.md, 2026-11-28 and 29).
_SPEEDRUN = dataclasses.replace(
    _FAST,
    name="speedrun",
    epochs=10,
    batch_size=2000,
    optimizer="muon",
    max_lr=0.04,
    muon_lr_scale=6.0,
    weight_decay=0.05,
    network="compact",
    activation="gelu",
    ema_epochs=0.25,
    pct_start=0.05,
    first_layer_share=0.3,
    early_scale=0.75,
    early_share=0.5,
    test_views="shifts",
)

# For a machine without a GPU: `speedrun` with fewer epochs of smaller batches and the rates for those; the
# biases of its first layer always learn.
_LAPTOP = dataclasses.replace(
    _SPEEDRUN,
    name="laptop",
    epochs=8,
    batch_size=512,
    max_lr=0.02,
    muon_lr_scale=7.0,
    first_layer_share=1.0,
)

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Decoupled weight decay, label smoothing, and a schedule that ends near zero.
        Recipe(),
        # The training assignment that the project grew out of, unchanged.
        Recipe(
            name="assignment",
            optimizer="adam",
            max_lr="auto",
            weight_decay=0.0,
            label_smoothing=0.0,
            final_div_factor=1.0,
            cycle_momentum=True,
        ),
        _FAST,
        _SPEEDRUN,
        _LAPTOP,
    )
}


def load_recipe(name_or_path: str) -> Recipe:
    """Return the preset of this name, or the recipe in this JSON file.

    Raises UserError if there is no such preset or file, or if the file does not hold a valid recipe.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    expected = f"expected auto, {', '.join(PRESETS)}, or a recipe's JSON file"
    if path.suffix != ".json":
        raise UserError(f"--recipe {name_or_path}: no such recipe; {expected}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--recipe {path}: cannot be read ({error}); {expected}") from error
    if not isinstance(values, dict):
        raise UserError(f"--recipe {path}: expected a JSON object of recipe fields")
    try:
        return Recipe.from_dict(values)
    except UserError as error:
        raise UserError(f"--recipe {path}: {error}") from error
