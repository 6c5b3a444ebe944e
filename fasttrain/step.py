"""One training step: autocast, loss, backward, optimizer, schedule.

A step never waits for the device, except with fp16 and Muon, where the gradient scaler does.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.cuda_graph import CaptureError, capture
from fasttrain.distributed import World
from fasttrain.ema import WeightAverage
from fasttrain.loss import Objective
from fasttrain.model import ImageClassifier
from fasttrain.optim import ScheduleTable, build_optimizer, one_cycle, set_schedule
from fasttrain.recipe import Phase, Recipe
from fasttrain.runtime import Runtime
from fasttrain.system.memory import pinning_fails
from fasttrain.system.precision import autocast
from fasttrain.system.rng import fork_rng
from fasttrain.system.signals import die_of_signals


class TrainStep:
    """Called with a batch, it updates the model, and adds loss and correct predictions to sums on the device.

    runtime: device and precision; fp16 gets a gradient scaler. With its cuda_graph, the step is captured,
    once for each phase, and then replayed. Its fallbacks get a line if a capture fails.
    max_lr: the schedule's peak. total_steps: the schedule's length.
    class_weights_K: as in loss.cross_entropy.
    world: the ranks that train together. Each rank passes its own part of the batch; gradients, metrics and
    the detection of NaN cover all ranks.
    average: the moving average of the weights, if the recipe asks for one.
    captures: whether steps are replayed from a CUDA graph.
    """

    def __init__(
        self,
        model: ImageClassifier,
        recipe: Recipe,
        runtime: Runtime,
        *,
        max_lr: float,
        total_steps: int,
        class_weights_K: Tensor | None = None,
        world: World | None = None,
    ) -> None:
        device, self.compute_dtype = runtime.device, runtime.dtype
        self.model = model.to(device)
        self.world = world or World(device=device)
        self.recipe, self.max_lr, self.total_steps = recipe, max_lr, total_steps
        self.device = device
        self.step = 0
        self.optimizer = build_optimizer(model, recipe, lr=max_lr, fused=runtime.fused_optimizer)
        horizon = recipe.ema_epochs * total_steps / recipe.epochs
        self.average = WeightAverage(self.model, horizon, fused=runtime.fused_optimizer) if horizon else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.compute_dtype == torch.float16)
        self.fallbacks = runtime.fallbacks
        self.captures = runtime.cuda_graph
        self._replays: dict[Phase, Callable[[Tensor, Tensor], None]] = {}
        self._captured_for: tuple[int, float] | None = None
        # A captured update reads its rate from a table. But fused Adam takes beta1 only as a number, and a
        # scaler counts on the host: with cycle_momentum or fp16 the graph ends before the update.
        self._updates_in_work = not self.captures or not (self.scaler.is_enabled() or recipe.cycle_momentum)
        # An update outside of the graph reads the gradients of the last capture: then there is one at a time.
        self._phases_at_once = None if self._updates_in_work else 1
        if self.captures and self._updates_in_work:
            for group in self.optimizer.param_groups:
                group["capturable"] = True  # before a state is loaded: its step counts must be on the GPU
        self._table: ScheduleTable | None = None
        self._compile_mode: str | None = None
        self._trains_first_layer = True
        objective = Objective(self.model, recipe.label_smoothing, class_weights_K, device)
        self._plain_objective, self._sums = objective, objective.sums
        self._objective = self.world.parallel(objective)
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._objective
        self._images = 0
        self._since = 0
        self._peek = _Peek(device)

    @property
    def lr(self) -> float:
        """The learning rate of the last step taken."""
        return one_cycle(max(self.step - 1, 0), self.total_steps, self.max_lr, self.recipe)[0]

    @property
    def phase(self) -> Phase:
        """What the next step works on; it shrinks larger images to the phase's resolution."""
        return self.recipe.phase(self.step, self.total_steps)

    @property
    def eval_model(self) -> ImageClassifier:
        """The network to evaluate and save: the averaged one if there is one, else the trained one."""
        return self.average.model if self.average else self.model  # type: ignore[return-value]  # a copy

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        """Take one optimizer step on one batch. Raises ValueError after the schedule's last step.

        images_NCHW: pixels from 0 to 255, uint8 in channels_last. labels_N: int64. Both on the device.
        """
        if self.step >= self.total_steps:
            raise ValueError(f"step {self.step} is past the schedule's {self.total_steps} steps")
        phase = self.phase
        if self._lacks_capture(phase) or self._parallel_changes(phase):
            self.warm_up(images_NCHW, labels_N)
        if self._table is None:
            set_schedule(self.optimizer, *one_cycle(self.step, self.total_steps, self.max_lr, self.recipe))
        work = self._replays.get(phase) or functools.partial(self._work, phase=phase)
        work(images_NCHW, labels_N)
        if not self._updates_in_work:
            self._update()
        self._images += len(labels_N)
        self.step += 1

    def take_metrics(self) -> tuple[float, float]:
        """Return mean loss and accuracy (0 to 1) since the last call, of all ranks. Waits for the device."""
        means = _means(self.world.all_reduce_sum(self._sums[:2]), self._images * self.world.size)
        self._sums.zero_()
        self._images, self._since = 0, self.step
        self._peek.forget()
        return means

    def peek_metrics(self) -> tuple[float, float] | None:
        """Return this rank's mean loss and accuracy so far, slightly out of date, without waiting."""
        return self._peek(self._sums[:2], self._images)

    def diverged(self) -> int | None:
        """Return the first step, counted from 1, with a NaN or infinite loss since take_metrics, or None.

        If all losses were finite but the weights are not, return the last step. Waits for the device.
        """
        finite_steps = int(self.world.all_reduce_min(self._sums[2]).item())
        if finite_steps < self.step - self._since:
            return self._since + finite_steps + 1
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()])
        return None if finite.all().item() else self.step

    def compile(self, mode: str | None) -> None:
        """Apply torch.compile to the network and its loss; the time is spent in warm_up or the first step.

        mode: None for eager steps.
        """
        self._compile_mode = mode
        self._forward = self._objective
        if mode is not None:
            self._forward = torch.compile(self._objective, mode=mode, dynamic=False)
        self._forget_captures()

    def measure_seconds(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        """Return the seconds of a step like the last, the mean of 20. Restores the state afterwards."""
        repeats, phase = 20, self.recipe.phase(self.total_steps - 1, self.total_steps)
        if self._lacks_capture(phase):
            self.warm_up(images_NCHW, labels_N, [phase])
        work = self._replays.get(phase) or functools.partial(self._work, phase=phase)
        with self._preserve_state():
            work(images_NCHW, labels_N)
            self._sums.tolist()  # waits for the device
            start = time.perf_counter()
            for _ in range(repeats):
                work(images_NCHW, labels_N)
            self._sums.tolist()
            return (time.perf_counter() - start) / repeats

    def warm_up(self, images_NCHW: Tensor, labels_N: Tensor, phases: Sequence[Phase] | None = None) -> float:
        """Compile and capture on a batch like those to come; returns the seconds taken, 0 for neither.

        phases: those to compile and capture for; by default all from the next step on, so that no later step
        takes longer (an update that cannot be captured allows one captured phase, the others follow later).
        Several ranks take a step in any case: DistributedDataParallel orders its sums by the first backward
        pass, and a resumed run has to add up in the same order as one that was never interrupted.
        If a capture fails, later steps launch every kernel.
        Restores weights, statistics, the optimizer's state and random generators.
        """
        is_compiled = self._compile_mode is not None
        if not is_compiled and not self.captures and self.world.size == 1:
            return 0.0
        start = time.perf_counter()
        if self.captures:
            self._forget_captures()  # frees their memory for the next ones
            if self._updates_in_work:
                self._table = self._tabulate_schedule()
        try:
            phases = phases or self.recipe.phases_from(self.step, self.total_steps)
            self._try_steps(images_NCHW, labels_N, phases)
        except CaptureError as error:
            self._stop_capturing(error)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start if is_compiled or self.captures else 0.0

    def _try_steps(self, images_NCHW: Tensor, labels_N: Tensor, phases: Sequence[Phase]) -> None:
        """Take a step of each phase, compiled and captured as later ones will be, and undo them."""
        with self._preserve_state(), warnings.catch_warnings():
            # A capturable optimizer warns about the calls before the capture.
            warnings.filterwarnings("ignore", message=".*capturable=True")
            # Backwards, to end where the next step begins. A phase in which several ranks would average other
            # gradients has to wait until they get there.
            captured = phases[: self._phases_at_once][::-1] if self.captures else []
            for phase in reversed(phases):
                if phase not in captured and (phase == self.phase or not self._parallel_changes(phase)):
                    self._work(images_NCHW, labels_N, phase)
            works = [functools.partial(self._work, phase=phase) for phase in captured]
            self._replays = dict(zip(captured, capture(works, images_NCHW, labels_N), strict=True))
            self._captured_for = self.total_steps, self.max_lr

    def _lacks_capture(self, phase: Phase) -> bool:
        """Return whether a step of this phase has yet to be captured, for the schedule as it is now."""
        is_captured = self._captured_for == (self.total_steps, self.max_lr) and phase in self._replays
        return self.captures and not is_captured

    def _stop_capturing(self, error: CaptureError) -> None:
        self.fallbacks(
            f"CUDA graph: the capture failed ({error})",
            "the host launches every kernel, which leaves a fast GPU idle in between",
        )
        self._forget_captures()
        self.captures, self._table = False, None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step and the next metrics depend on, except eval_model."""
        return {
            **({"trained_model": self.model.state_dict()} if self.average else {}),
            # A warm-up before the first step leaves zeros, which mean the same as no state: save none.
            "optimizer": self.optimizer.state_dict() | ({} if self.step else {"state": {}}),
            "scheduler": {"step": self.step, "total_steps": self.total_steps, "max_lr": self.max_lr},
            "scaler": self.scaler.state_dict(),
            "metrics": {"sums": self._sums, "images": self._images, "since": self._since},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        if self.average:
            self.model.load_state_dict(state["trained_model"])
        self.step = state["scheduler"]["step"]
        self.total_steps = state["scheduler"]["total_steps"]
        self.max_lr = state["scheduler"]["max_lr"]
        # The groups' settings follow from the recipe and the step: none of them are taken from a file.
        if self.step:
            set_schedule(
                self.optimizer, *one_cycle(self.step - 1, self.total_steps, self.max_lr, self.recipe)
            )
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
        self._forget_captures()  # they refer to the optimizer's former tensors

    def _parallel_changes(self, phase: Phase) -> bool:
        """Return whether several ranks average other gradients in this phase than until now."""
        return self.world.size > 1 and phase.trains_first_layer != self._trains_first_layer

    def _enter(self, phase: Phase) -> None:
        if phase.trains_first_layer == self._trains_first_layer:
            return
        self._trains_first_layer = phase.trains_first_layer
        self.model.train_first_layer(phase.trains_first_layer)
        if self.world.size > 1:  # DistributedDataParallel expects the gradients that it was built for
            self._objective = self.world.parallel(self._plain_objective)
            self.compile(self._compile_mode)

    def _work(self, images_NCHW: Tensor, labels_N: Tensor, phase: Phase) -> None:
        """Do the device's part of a step, except for an update that cannot be captured."""
        self._enter(phase)
        self.model.train()
        # Before the backward pass, not after the update: the graph has to allocate the gradients itself.
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.compute_dtype):
            loss = self._forward(shrink(images_NCHW, phase.resolution), labels_N)
        self.scaler.scale(loss).backward()
        if self._updates_in_work:
            self._update()

    def _update(self) -> None:
        if self._table:
            self._table.advance()
        with autocast(self.device, self.compute_dtype):  # for the optimizer's matrix products
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update(self._table.values[-1] if self._table else self.average.share(self.step))

    def _tabulate_schedule(self) -> ScheduleTable:
        """Return the table of all steps, and let the optimizer read its groups' rates from it."""
        groups = self.optimizer.param_groups
        rows = []
        for step in range(self.total_steps):
            lr, _ = one_cycle(step, self.total_steps, self.max_lr, self.recipe)
            share = [self.average.share(step)] if self.average else []
            rows.append([*(lr * group["lr_scale"] for group in groups), *share])
        table = ScheduleTable(rows, self.step, self.device)
        for group, rate in zip(groups, table.values, strict=False):  # the last value may be the share
            group["lr"] = rate
        return table

    def _forget_captures(self) -> None:
        self._replays, self._captured_for = {}, None

    @contextmanager
    def _preserve_state(self) -> Iterator[None]:
        """After the block, put back everything that a step changes, in the same tensors."""
        known = set(map(id, self._optimizer_tensors()))
        kept = [*self.model.parameters(), *self.model.buffers(), self._sums, *self._optimizer_tensors()]
        kept += self.average.tensors if self.average else []
        kept += [self._table.step] if self._table else []
        copies, scaler = [tensor.detach().clone() for tensor in kept], self.scaler.state_dict()
        # Ranks wait for each other's gradients in torch, where no handler runs.
        waiting = nullcontext() if self.world.size == 1 else die_of_signals()
        try:
            with fork_rng(self.device), waiting:
                yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(kept, copies, strict=True):
                    tensor.copy_(copy)
                for tensor in self._optimizer_tensors():
                    if id(tensor) not in known:  # made in the block: as the optimizer initialises it
                        tensor.zero_()
            self.scaler.load_state_dict(scaler)
            if not self._replays:
                self.optimizer.zero_grad(set_to_none=True)

    def _optimizer_tensors(self) -> list[Tensor]:
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]


class _Peek:
    """The sums as of a moment ago, read without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A GPU copies into pinned memory while the host continues; allocated once, since that may wait.
        self._landing = torch.zeros(2, pin_memory=device.type == "cuda" and not pinning_fails())
        self.forget()

    def forget(self) -> None:
        """Start again. Only call this while no copy is under way: after waiting for the device."""
        self._under_way: tuple[torch.cuda.Event, int] | None = None
        self._newest: tuple[float, float] | None = None

    def __call__(self, sums: Tensor, images: int) -> tuple[float, float] | None:
        """Return the means of the newest copy that has arrived, and start the next copy.

        None if nothing has arrived yet, and on devices that can only be read by waiting for them.
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
    """Shrink images to a resolution by antialiased bilinear filtering, as float32 from 0 to 255.

    Images that have this resolution already are returned unchanged.
    """
    if images_NCHW.shape[3] == resolution:
        return images_NCHW
    return F.interpolate(images_NCHW.float(), size=(resolution, resolution), mode="bilinear", antialias=True)


def _means(sums: Tensor, images: int) -> tuple[float, float]:
    """Return mean loss and accuracy (0 to 1); waits for the device that holds the sums."""
    loss_sum, correct = sums.tolist()
    return loss_sum / max(images, 1), correct / max(images, 1)
