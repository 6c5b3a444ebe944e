"""What is trained and how: one frozen dataclass, its checks, and the named presets.

Every default stands here once. Command-line flags are generated from the fields, `recipe.json` in a run's
folder is this dataclass written out, and an unknown key or an impossible value is refused by name.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fasttrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training recipe. The defaults are the preset `default`."""

    name: str = "default"
    """Label of the recipe in run folders and results."""
    epochs: int = 24
    """Passes over the training images."""
    batch_size: int = 512
    """Images per step, of all ranks together; the last, smaller batch of an epoch is dropped."""
    seed: int = 0
    """Seeds the weights, the order of the images and the augmentation."""

    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """adam: weight decay is added to the gradient. adamw: it is decoupled (arXiv:1711.05101). muon: adamw,
    but for convolutions, whose momentum is orthogonalised."""
    max_lr: float | Literal["auto"] = 0.01
    """Peak of the one-cycle schedule; auto asks the LR finder before the training."""
    weight_decay: float = 0.2
    """Weight decay on convolution and linear weights; BatchNorm and biases have none."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes (arXiv:1512.00567)."""
    dropout: float = 0.0
    """Dropout after every activation; the modules stay in the network at 0."""

    width: int = 64
    """Channels of the network's first convolution; the others have two, four and eight times as many."""
    activation: Literal["relu", "gelu"] = "relu"
    """What stands after every BatchNorm; gelu is smooth (arXiv:1606.08415)."""
    init: Literal["default", "dirac"] = "default"
    """dirac: of every convolution, the first filters pass its input channels on (arXiv:1706.00388)."""
    bn_momentum: float = 0.1
    """Share of each batch in BatchNorm's running mean and variance."""
    bn_bias_lr_scale: float = 1.0
    """BatchNorm's biases learn at the schedule's rate times this."""
    muon_lr_scale: float = 10.0
    """With muon, convolutions learn at the schedule's rate times this: a step renews that share."""
    logit_scale: float = 1.0
    """The last layer's outputs are multiplied by this."""
    ema_epochs: float = 0.0
    """Evaluate and ship an average of the weights over about the last so many epochs; 0 switches it off."""

    pct_start: float = 5 / 24
    """Share of all steps before the peak of the schedule: 5/24 peaks at epoch 5 of 24."""
    div_factor: float = 25.0
    """First learning rate = max_lr / div_factor."""
    final_div_factor: float = 1000.0
    """Last learning rate = first learning rate / final_div_factor; 1 means no annihilation."""
    cycle_momentum: bool = False
    """Let Adam's beta1 run from 0.95 down to 0.85 and back while the learning rate rises and falls."""

    resolution: int = 32
    """Pixels of a side that your own images are scaled to; CIFAR's have 32."""
    early_resolution: int = 0
    """Pixels of a side that the images of the first steps are shrunk to; 0 switches it off."""
    early_share: float = 0.6
    """With early_resolution: share of all steps that the shrunk images get."""
    crop_padding: int = 4
    """Reflect-pad by this many pixels, then crop at a random offset; 0 switches it off."""
    flip: bool = True
    """Mirror half of the images, as flip_order says."""
    flip_order: Literal["random", "alternating"] = "random"
    """random: a coin per image and epoch. alternating: a first coin, then in turn (arXiv:2404.00498)."""
    cutout: int = 8
    """Side of the square that is set to the mean at a random place; 0 switches it off."""
    test_flip: bool = False
    """Give a second test accuracy, of the mean logits of each image and its mirror image."""

    compute_dtype: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    """Precision of the matrix products; auto takes bf16 where the hardware is fast in it."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = "auto"
    """torch.compile's mode; auto compiles on a GPU where it can pay within the run, and not on a CPU."""
    cuda_graph: bool = True
    """On an NVIDIA GPU, record the step once and replay it in one launch; not with several ranks."""
    sync_batchnorm: bool = False
    """Let BatchNorm see the whole batch where several ranks share it; by default each sees its own part."""
    loader: Literal["auto", "dali", "tensor"] = "auto"
    """The data path: DALI, or the pure-torch loader; auto takes DALI where it is installed."""
    loader_threads: int = 2
    """DALI's worker threads."""

    def __post_init__(self) -> None:
        for field, wanted in get_type_hints(type(self)).items():
            _require_type(field, getattr(self, field), wanted)
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2 (BatchNorm needs two images)"),
            ("seed", 0 <= self.seed < 2**31, "from 0 to 2147483647"),
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
            (
                "early_resolution",
                self.early_resolution == 0 or self.early_resolution in range(16, self.resolution, 8),
                f"0, or a multiple of 8 from 16 to below --resolution {self.resolution}",
            ),
            ("early_share", 0 < self.early_share < 1, "between 0 and 1"),
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
        return dataclasses.asdict(self)

    def training_resolution(self, step: int, total_steps: int) -> int:
        """Pixels of a side that this step, counted from 0, trains on."""
        early = self.early_resolution and step < self.early_share * total_steps
        return self.early_resolution if early else self.resolution

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe with these fields; missing ones keep their defaults.

        Raises UserError on a key that is no field of a recipe, and on an impossible value.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise UserError(f"unknown recipe key {key!r}: expected one of {', '.join(fields)}")
        return cls(**values)


def flag(field: str) -> str:
    """The command line's flag of a field."""
    return "--" + field.replace("_", "-")


def _require_type(field: str, value: object, wanted: Any) -> None:
    """Refuse a value of another type than the field's; an int will do for a float."""
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


# The shortest schedule: more of what helps when there is little time, small batches for more steps, no cutout
# and few positions of the crop, which need more of them, and a last layer that AdamW cannot throw about. The
# cutout was chosen by ablation (python -m benchmarks.recipes); batches, crop and logit_scale follow a few
# pairs of runs, the weight decay the number of steps. The other values are still the literature's
# (arXiv:2404.00498): those tried so far could not be told from chance.
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
    test_flip=True,
)

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Decoupled weight decay, label smoothing, and a schedule that ends near zero.
        Recipe(),
        # The training assignment that the project grew from, as it was.
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
        # `fast` with another optimizer, and another network, than those that the project is about.
        dataclasses.replace(
            _FAST,
            name="speedrun",
            epochs=4,
            optimizer="muon",
            weight_decay=0.05,
            activation="gelu",
            ema_epochs=0.25,
            pct_start=0.05,
        ),
        # For a machine without a GPU: few epochs, and smaller batches so that they hold enough steps.
        Recipe(name="laptop", epochs=3, batch_size=256, weight_decay=0.5, pct_start=0.3),
    )
}


def load_recipe(name_or_path: str) -> Recipe:
    """The preset of this name, or the recipe in this JSON file.

    Raises UserError if there is no such preset or file, and if the file holds no valid recipe.
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
