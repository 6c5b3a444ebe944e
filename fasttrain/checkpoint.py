"""Checkpoints: written atomically on a thread of their own, read without trusting them."""

import io
import math
import re
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.cifar import Dataset
from fasttrain.errors import UserError
from fasttrain.files import link_atomically, write_atomically
from fasttrain.machine import DTYPES, fork_rng
from fasttrain.model import CustomResNet, build_model
from fasttrain.proof import require_proven
from fasttrain.recipe import Recipe

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"

REQUIRED = (
    "model",
    "epoch",
    "optimizer",
    "scheduler",
    "scaler",
    "loss",
    "batch_size",
    "recipe",
    "classes",
    "dataset",
    "progress",
    "metrics",
)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name stays until the new one is whole."""
    buffer = io.BytesIO()  # torch.save hides a full disk behind errors of its own; a plain write does not
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only (weights_only).

    Raises UserError if there is no such file, if any byte of its content has changed since it was written, or
    if it is not a checkpoint of this project.
    """
    expected = "expected a checkpoint that fasttrain wrote, such as runs/.../last.pt"
    try:
        content = io.BytesIO(path.read_bytes())
        _verify_checksums(content)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {expected}") from error
    except Exception as error:  # a torn or foreign file fails anywhere in zipfile, pickle or torch
        reason = type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); {expected}") from error
    missing = [key for key in REQUIRED if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path}: holds no {', '.join(missing)}; {expected}")
    model = state["model"]
    if isinstance(model, dict) and "inverse_std" in model:  # a CustomResNet, maybe of before it scaled logits
        model.setdefault("logit_scale", torch.ones(()))
    return state


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The network of a checkpoint, and what the checkpoint says of it.

    model: in evaluation mode. classes: their names in the order of the logits. dataset: the images' name.
    precision: what the training computed in: bf16, fp16, fp32 or tf32; None if the checkpoint does not say.
    metrics: the row of metrics.jsonl that the training measured on these weights; None where they have been
    trained further since.
    """

    model: CustomResNet
    recipe: Recipe
    classes: list[str]
    dataset: str
    epoch: int
    precision: str | None
    metrics: dict[str, float] | None

    def require_classes_of(self, dataset: Dataset) -> None:
        """Raise UserError unless the data set's labels mean the classes that the network was trained on."""
        if list(dataset.classes) != self.classes:
            raise UserError(
                f"it was trained on {self.dataset}, not on {dataset.name}, which has other classes; "
                "name its --data"
            )


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_model(
    path: Path, device: torch.device, announce: Callable[[str], object] = _print_to_stderr
) -> TrainedModel:
    """Rebuild the network of a checkpoint, and check that it is the one that was saved.

    announce: called with one line if the checkpoint holds no proof.
    Raises UserError if the file is not a checkpoint, or if the network's logits differ from the saved ones.
    """
    state = load_checkpoint(path)
    try:
        recipe, classes = Recipe.from_dict(state["recipe"]), list(state["classes"])
        trained = TrainedModel(
            model=restore_model(state, recipe, len(classes), device),
            recipe=recipe,
            classes=classes,
            dataset=str(state["dataset"]),
            epoch=int(state["epoch"]),
            precision=saved_precision(state),
            metrics=_metrics_of_these_weights(state),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"{path}: expected a checkpoint as fasttrain writes it ({reason}); train it again"
        ) from error
    if "proof" not in state:
        announce(unproven(path))
    return trained


def unproven(path: Path) -> str:
    """The line about a checkpoint without a proof."""
    return (
        f"{path}: unproven: written before checkpoints held a proof; the network is rebuilt from its recipe"
    )


def saved_precision(state: dict[str, Any]) -> str | None:
    """The precision that the checkpoint's run computes in; None where it does not say."""
    fingerprint = state.get("fingerprint")
    precision = fingerprint.get("precision") if isinstance(fingerprint, dict) else None
    return precision if isinstance(precision, str) and precision in DTYPES else None


def _metrics_of_these_weights(state: dict[str, Any]) -> dict[str, float] | None:
    rows = state["progress"]["epochs"]
    if not rows or state["metrics"]["images"]:  # images trained on since the last evaluation
        return None
    return {**rows[-1], "test_accuracy": float(rows[-1]["test_accuracy"])}


def restore_model(
    state: dict[str, Any], recipe: Recipe, num_classes: int, device: torch.device
) -> CustomResNet:
    """The network of a loaded checkpoint, in evaluation mode, checked against its proof if it has one.

    Raises UserError if the weights do not fit, or if the network's logits differ from the saved ones.
    """
    model = model_with_weights(recipe, num_classes, state["model"]).to(device)
    if "proof" in state:
        require_proven(model, state["proof"])
    return model


def model_with_weights(recipe: Recipe, num_classes: int, weights: dict[str, Tensor]) -> CustomResNet:
    """The recipe's network with these weights, on the CPU and in evaluation mode.

    The weights hold the mean and standard deviation of the training images. Raises UserError if they do not
    fit the network.
    """
    with fork_rng(torch.device("cpu")):  # a new network draws its weights from the global generator
        model = build_model(recipe, num_classes)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        first, *details = str(error).splitlines()
        reason = details[0].strip() if details else first  # torch names the weights from the second line on
        raise UserError(f"its weights do not fit the network ({reason}); train it again") from error
    return model.eval()


def _verify_checksums(content: io.BytesIO) -> None:
    """Hold a checkpoint's parts against the CRC-32 that torch.save stores and torch.load does not look at."""
    with zipfile.ZipFile(content) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise zipfile.BadZipFile("compressed, which torch.save never does")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum differs")
    content.seek(0)


@dataclass(frozen=True)
class SaveInterval:
    """How much training may pass between two checkpoints: so many steps, or so many seconds."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> "SaveInterval":
        """From --save-every: 500 means steps, 60s seconds. Raises UserError for anything else."""
        match = re.fullmatch(r"([0-9]+)(s?)", text)
        if not match or not int(match[1]):
            raise UserError(f"--save-every {text}: expected steps, as 500, or seconds, as 60s")
        return cls(seconds=int(match[1])) if match[2] else cls(steps=int(match[1]))

    def over(self, steps: int, seconds: float) -> bool:
        return steps >= self.steps or seconds >= self.seconds


class CheckpointWriter:
    """Writes a run's last.pt, previous.pt and best.pt in the background, one state at a time.

    Only copying the state keeps the training waiting. What goes wrong on the thread is raised by the next
    call, or at the end of the `with` block.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self._device = folder, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._held_best: dict[str, Any] | None = None

    def write(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a copy of the state as last.pt, and as best.pt too if it is the best so far.

        A state that is held becomes best.pt unless this one does.
        """
        self.wait()
        held, self._held_best = None if best else self._held_best, None
        self._pending = self._thread.submit(self._write, snapshot(state, self._device), best, held)

    def hold_best(self, state: dict[str, Any]) -> None:
        """Keep a copy of the best state so far in memory: the next write makes it best.pt."""
        self._held_best = snapshot(state, self._device)

    def forget_best(self) -> None:
        """Drop what is held: the run goes back to before it."""
        self._held_best = None

    def wait(self) -> None:
        """Return when the state given last is on the disk. Raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def _write(self, state: dict[str, Any], best: bool, held_best: dict[str, Any] | None) -> None:
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        if held_best is not None:
            save_checkpoint(self.folder / BEST, held_best)
        if last.exists():
            link_atomically(last, previous)
        if best:
            save_checkpoint(self.folder / BEST, state)
            link_atomically(self.folder / BEST, last)
        else:
            save_checkpoint(last, state)


def snapshot(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of nested dicts, lists and tensors in the host's memory. Waits for the device."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return host.copy_(value, non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {key: copy(entry) for key, entry in value.items()}
        return [copy(entry) for entry in value] if isinstance(value, list) else value

    copied = copy(state)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copied


def require_like(value: Any, example: Any, place: str) -> None:
    """Raise UserError unless a value from a file has the example's keys, types, shapes and finite figures."""
    if isinstance(example, dict):
        fits = isinstance(value, dict) and value.keys() == example.keys()
        expected = f"the keys {', '.join(map(str, example))}"
    elif isinstance(example, Tensor):
        fits = isinstance(value, Tensor) and value.layout == example.layout
        fits = fits and (value.shape, value.dtype) == (example.shape, example.dtype)
        fits = fits and bool(value.isfinite().all())
        expected = f"finite {example.dtype} of shape {tuple(example.shape)}"
    elif isinstance(example, float):
        fits = type(value) in (int, float) and 0 <= value < float("inf")
        expected = "a figure of 0 or more"
    elif isinstance(example, int):
        fits = type(value) is int and value >= 0
        expected = "a whole number of 0 or more"
    else:
        fits = example is None or type(value) is type(example)
        expected = type(example).__name__
    if not fits:
        raise UserError(f"{place} is not {expected}")
    if isinstance(example, dict):
        for key, entry in example.items():
            require_like(value[key], entry, f"{place}.{key}")
