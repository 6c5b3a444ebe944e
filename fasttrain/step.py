"""One training step: autocast, loss, backward, optimizer, schedule. Nothing in here waits for the device."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.cuda_graph import capture
from fasttrain.distributed import World
from fasttrain.ema import WeightAverage
from fasttrain.model import CustomResNet
from fasttrain.optim import build_optimizer, one_cycle, set_schedule
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.system.precision import autocast
from fasttrain.system.rng import fork_rng


class TrainStep:
    """Call it with a batch: it updates the model, and sums loss and correct predictions on the device.

    runtime: where and in which precision; fp16 gets a gradient scaler. With its cuda_graph the step is
    captured once and replayed from then on.
    world: the ranks that train together. Each calls it with its own part of the batch; gradients, metrics and
    the search for a NaN are those of all.
    average: of the weights, where the recipe asks for it.
    """

    def __init__(
        self,
        model: CustomResNet,
        recipe: Recipe,
        runtime: Runtime,
        *,
        max_lr: float,
        total_steps: int,
        world: World | None = None,
    ) -> None:
        device, self.compute_dtype = runtime.device, runtime.dtype
        self.model = model.to(device)
        self.world = world or World(device=device)
        self.recipe, self.max_lr, self.total_steps = recipe, max_lr, total_steps
        self.device = device
        self.step = 0
        self.optimizer = build_optimizer(model, recipe, lr=max_lr)
        horizon = recipe.ema_epochs * total_steps / recipe.epochs
        self.average = WeightAverage(self.model, horizon) if horizon else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.compute_dtype == torch.float16)
        self.loss_fn = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._captures = runtime.cuda_graph
        self._replay: Callable[[Tensor, Tensor], None] | None = None
        self._captured_resolution = 0
        # A captured update reads its rate from a tensor. Fused Adam takes beta1 only as a number, and a
        # scaler counts on the host: where either changes from step to step, the update follows the replay.
        self._updates_in_work = not self._captures or not (self.scaler.is_enabled() or recipe.cycle_momentum)
        if self._captures and self._updates_in_work:
            for group in self.optimizer.param_groups:
                group["lr"], group["capturable"] = torch.tensor(group["lr"], device=device), True
        self._lr = max_lr
        self._compiled = False
        self._network = self.world.parallel(self.model)
        self._forward: Callable[[Tensor], Tensor] = self._network
        self._sums = torch.zeros(3, device=device)  # loss, correct, steps until the loss stopped being finite
        self._images = 0
        self._since = 0
        self._peek = _Peek(device)

    @property
    def lr(self) -> float:
        """The learning rate of the last step taken."""
        return self._lr

    @property
    def resolution(self) -> int:
        """The resolution that the next step trains on; it shrinks larger images."""
        return self.recipe.training_resolution(self.step, self.total_steps)

    @property
    def eval_model(self) -> CustomResNet:
        """The network to evaluate and to save: the averaged one, if there is one, else the trained one."""
        return self.average.model if self.average else self.model  # type: ignore[return-value]  # a copy

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        """One optimizer step on one batch. Raises ValueError past the schedule's end."""
        if self.step >= self.total_steps:
            raise ValueError(f"step {self.step} is past the schedule's {self.total_steps} steps")
        resolution = self.resolution
        if self._captures and (self._replay is None or self._captured_resolution != resolution):
            self.warm_up(images_NCHW, labels_N)
        self._lr, beta1 = one_cycle(self.step, self.total_steps, self.max_lr, self.recipe)
        set_schedule(self.optimizer, self._lr, beta1)
        if self.average:
            self.average.set_step(self.step)
        work = self._replay or functools.partial(self._work, resolution=resolution)
        work(images_NCHW, labels_N)
        if not self._updates_in_work:
            self._update()
        self._images += len(labels_N)
        self.step += 1

    def take_metrics(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) since the last call. Waits for the device."""
        means = _means(self.world.all_reduce_sum(self._sums[:2]), self._images * self.world.size)
        self._sums.zero_()
        self._images, self._since = 0, self.step
        self._peek.forget()
        return means

    def peek_metrics(self) -> tuple[float, float] | None:
        """The same, as of a moment ago and without waiting; None where nothing has arrived yet."""
        return self._peek(self._sums[:2], self._images)

    def diverged(self) -> int | None:
        """The first step, counted from 1, with a NaN or infinite loss since take_metrics; None if none had.

        The last step, where only the weights that it left are not finite. Waits for the device.
        """
        finite_steps = int(self.world.all_reduce_min(self._sums[2]).item())
        if finite_steps < self.step - self._since:
            return self._since + finite_steps + 1
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()])
        return None if finite.all().item() else self.step

    def compile(self, mode: str) -> None:
        """Take the network through torch.compile in this mode; warm_up or the first step pays for it."""
        self._forward = torch.compile(self._network, mode=mode, dynamic=False)
        self._compiled, self._replay = True, None

    def measure_seconds(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        """Seconds of a step on whole images, the mean of twenty. Changes nothing; waits for the device."""
        repeats, resolution = 20, self.recipe.resolution
        self.warm_up(images_NCHW, labels_N, resolution)
        work = self._replay or functools.partial(self._work, resolution=resolution)
        with self._preserve_state():
            work(images_NCHW, labels_N)
            self._sums.tolist()  # waits for the device
            start = time.perf_counter()
            for _ in range(repeats):
                work(images_NCHW, labels_N)
            self._sums.tolist()
            return (time.perf_counter() - start) / repeats

    def warm_up(self, images_NCHW: Tensor, labels_N: Tensor, resolution: int | None = None) -> float:
        """Compile and capture on one batch like those to come; returns the seconds it took, 0 for neither.

        resolution: the one to capture; by default the next step's. Later ones are compiled now too, but
        captured when their time comes: a capture takes a few steps and holds a step's memory.
        Several ranks take a step in any case: DistributedDataParallel orders its sums by the first backward
        pass, and a resumed run has to add up in the same order as one that was never interrupted.
        Leaves weights, statistics, the optimizer's state and random generators as they were.
        """
        if not self._compiled and not self._captures and self.world.size == 1:
            return 0.0
        start = time.perf_counter()
        resolution = resolution or self.resolution
        with self._preserve_state(), warnings.catch_warnings():
            # An optimizer made to be captured warns of the calls before the capture.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            if self._compiled and resolution != self.recipe.resolution:
                self._work(images_NCHW, labels_N, self.recipe.resolution)
            if self._captures:
                self._replay = None  # its memory is free for the next
                work = functools.partial(self._work, resolution=resolution)
                self._replay = capture(work, images_NCHW, labels_N)
                self._captured_resolution = resolution
            else:
                self._work(images_NCHW, labels_N, resolution)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start if self._compiled or self._captures else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step and the next metrics depend on, except the model to evaluate."""
        return {
            **({"trained_model": self.model.state_dict()} if self.average else {}),
            # Before the first step a warm-up has left zeros there, or nothing: the same to the optimizer.
            "optimizer": self.optimizer.state_dict() | ({} if self.step else {"state": {}}),
            "scheduler": {"step": self.step, "total_steps": self.total_steps, "max_lr": self.max_lr},
            "scaler": self.scaler.state_dict(),
            "metrics": {"sums": self._sums, "images": self._images, "since": self._since},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average:
            self.model.load_state_dict(state["trained_model"])
        self.step = state["scheduler"]["step"]
        self.total_steps = state["scheduler"]["total_steps"]
        self.max_lr = state["scheduler"]["max_lr"]
        # The groups' settings follow from the recipe and the step: nothing of them is taken from a file.
        if self.step:
            self._lr, beta1 = one_cycle(self.step - 1, self.total_steps, self.max_lr, self.recipe)
            set_schedule(self.optimizer, self._lr, beta1)
        self.optimizer.load_state_dict(
            {
                "state": state["optimizer"]["state"],
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        self.scaler.load_state_dict(state["scaler"])
        self._sums.copy_(state["metrics"]["sums"])
        self._images, self._since = state["metrics"]["images"], state["metrics"]["since"]
        self._peek.forget()
        self._replay = None  # it holds the optimizer's former tensors: capture anew

    def _work(self, images_NCHW: Tensor, labels_N: Tensor, resolution: int) -> None:
        """What the device does in a step, except for an update that cannot be captured."""
        logits_NK, loss = self._forward_backward(shrink(images_NCHW, resolution), labels_N)
        if self._updates_in_work:
            self._update()
        correct = (logits_NK.argmax(1) == labels_N).sum()
        loss_sum = loss * len(labels_N)
        # Once the sum is NaN or infinite it never comes back: the finite steps count up to the first bad one.
        self._sums += torch.stack([loss_sum, correct, (self._sums[0] + loss_sum).isfinite()])

    def _update(self) -> None:
        with autocast(self.device, self.compute_dtype):  # of an optimizer's matrix products
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()

    def _forward_backward(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mean loss, both detached, with the gradients left on the parameters."""
        self.model.train()
        # Here, not after the update: a replay's gradients stay where the capture wrote them.
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.compute_dtype):
            logits_NK = self._forward(images_NCHW)
        loss = self.loss_fn(logits_NK.float(), labels_N)
        self.scaler.scale(loss).backward()
        return logits_NK.detach(), loss.detach()

    @contextmanager
    def _preserve_state(self) -> Iterator[None]:
        """Put everything that a step changes back as it was, in the tensors where it was."""
        begins = not self.optimizer.state
        kept = [*self.model.parameters(), *self.model.buffers(), self._sums, *self._optimizer_tensors()]
        kept += self.average.tensors if self.average else []
        copies, scaler = [tensor.detach().clone() for tensor in kept], self.scaler.state_dict()
        with fork_rng(self.device):
            yield
        with torch.no_grad():
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)
            for tensor in self._optimizer_tensors() if begins else []:
                tensor.zero_()  # as a first step would have made it
        self.scaler.load_state_dict(scaler)
        if self._replay is None:
            self.optimizer.zero_grad(set_to_none=True)

    def _optimizer_tensors(self) -> list[Tensor]:
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]


class _Peek:
    """The sums as they were a moment ago, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A GPU copies into pinned memory while the host goes on; allocated once, since that may wait.
        self._landing = torch.zeros(2, pin_memory=device.type == "cuda")
        self.forget()

    def forget(self) -> None:
        """Begin anew. Only where no copy is under way: after waiting for the device."""
        self._under_way: tuple[torch.cuda.Event, int] | None = None
        self._newest: tuple[float, float] | None = None

    def __call__(self, sums: Tensor, images: int) -> tuple[float, float] | None:
        """Means over the images of the newest copy that has arrived; starts the next one behind it.

        None where nothing has arrived yet, and on devices that can only be read by waiting for them.
        """
        if not images or self._device.type not in ("cpu", "cuda"):
            return None
        if self._device.type == "cpu":
            return _means(sums, images)
        if self._under_way is not None:
            arrived, images_then = self._under_way
            if not arrived.query():
                return self._newest
            self._newest = _means(self._landing, images_then)
        self._landing.copy_(sums, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))
        self._under_way = arrived, images
        return self._newest


def shrink(images_NCHW: Tensor, resolution: int) -> Tensor:
    """The images at this resolution, each pixel the mean of what it covers; unchanged if they have it.

    Returns float32 of the same range (0 to 255).
    """
    if images_NCHW.shape[3] == resolution:
        return images_NCHW
    return F.interpolate(images_NCHW.float(), size=(resolution, resolution), mode="bilinear", antialias=True)


def _means(sums: Tensor, images: int) -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1); waits for the device that the sums are on."""
    loss_sum, correct = sums.tolist()
    return loss_sum / max(images, 1), correct / max(images, 1)
