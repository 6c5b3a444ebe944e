"""One training step: autocast, loss, backward, optimizer, schedule. Nothing in here waits for the device."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.distributed import World
from fasttrain.machine import compiler_available, fork_rng
from fasttrain.model import CustomResNet
from fasttrain.optim import build_optimizer, one_cycle, set_schedule
from fasttrain.recipe import Recipe


class TrainStep:
    """Call it with a batch; it updates the model and keeps sums of loss and hits on the device.

    compute_dtype: dtype of the matrix products; float32 means no autocast. fp16 gets a gradient scaler.
    compile_mode: torch.compile's mode, or None for eager.
    world: the ranks that train together. Each calls it with its own part of the batch; gradients, metrics and
    the search for a NaN are those of all.
    """

    def __init__(
        self,
        model: CustomResNet,
        recipe: Recipe,
        *,
        max_lr: float,
        total_steps: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        compile_mode: str | None,
        world: World | None = None,
    ) -> None:
        self.model = model.to(device)
        self.world = world or World(device=device)
        self.recipe, self.max_lr, self.total_steps = recipe, max_lr, total_steps
        self.device, self.compute_dtype = device, compute_dtype
        self.step = 0
        self.optimizer = build_optimizer(model, recipe, lr=max_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
        self.loss_fn = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._compiled = compile_mode is not None
        network = self.world.parallel(self.model)
        self._forward: Callable[[Tensor], Tensor] = (
            torch.compile(network, mode=compile_mode, dynamic=False) if compile_mode is not None else network
        )
        self._sums = torch.zeros(3, device=device)  # loss, hits, steps until the loss stopped being finite
        self._images = 0
        self._since = 0
        self._peek = _Peek(device)

    @property
    def lr(self) -> float:
        """The learning rate of the last step taken."""
        return self.optimizer.param_groups[0]["lr"]

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        """One optimizer step on one batch. Raises ValueError past the schedule's end."""
        if self.step >= self.total_steps:
            raise ValueError(f"step {self.step} is past the schedule's {self.total_steps} steps")
        lr, beta1 = one_cycle(self.step, self.total_steps, self.max_lr, self.recipe)
        set_schedule(self.optimizer, lr, beta1)
        logits_NK, loss = self._forward_backward(images_NCHW, labels_N)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        hits = (logits_NK.argmax(1) == labels_N).sum()
        loss_sum = loss * len(labels_N)
        # Once the sum is NaN or infinite it never comes back: the finite steps count up to the first bad one.
        self._sums += torch.stack([loss_sum, hits, (self._sums[0] + loss_sum).isfinite()])
        self._images += len(labels_N)
        self.step += 1

    def take_metrics(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 to 1) since the last call. Waits for the device."""
        means = _means(self.world.total(self._sums[:2]), self._images * self.world.size)
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
        finite_steps = int(self.world.smallest(self._sums[2]).item())
        if finite_steps < self.step - self._since:
            return self._since + finite_steps + 1
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()])
        return None if finite.all().item() else self.step

    def warm_up(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        """Compile on one batch like those to come; returns the seconds it took, 0 for an eager step.

        With several ranks an eager step is taken too: DistributedDataParallel orders its sums by the first
        backward pass, and a resumed run has to add up in the same order as one that nobody stopped.
        Leaves weights, BatchNorm's statistics and random generators as they were.
        """
        if not self._compiled and self.world.size == 1:
            return 0.0
        start = time.perf_counter()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with fork_rng(self.device):
            self._forward_backward(images_NCHW, labels_N)
        self.optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start if self._compiled else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step and the next metrics depend on, but for the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"step": self.step, "total_steps": self.total_steps, "max_lr": self.max_lr},
            "scaler": self.scaler.state_dict(),
            "metrics": {"sums": self._sums, "images": self._images, "since": self._since},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["scheduler"]["step"]
        self.total_steps = state["scheduler"]["total_steps"]
        self.max_lr = state["scheduler"]["max_lr"]
        # The groups' settings follow from the recipe and the step: nothing of them is taken from a file.
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

    def _forward_backward(self, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mean loss, both detached, with the gradients left on the parameters."""
        self.model.train()
        with autocast(self.device, self.compute_dtype):
            logits_NK = self._forward(images_NCHW)
        loss = self.loss_fn(logits_NK.float(), labels_N)
        self.scaler.scale(loss).backward()
        return logits_NK.detach(), loss.detach()


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


def _means(sums: Tensor, images: int) -> tuple[float, float]:
    """Mean loss and accuracy (0 to 1); waits for the device that the sums are on."""
    loss_sum, hits = sums.tolist()
    return loss_sum / max(images, 1), hits / max(images, 1)


def autocast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Autocast to the compute dtype; does nothing at float32."""
    enabled = compute_dtype != torch.float32
    return torch.autocast(device.type, dtype=compute_dtype if enabled else None, enabled=enabled)


def pick_compile_mode(requested: str, device: torch.device, announce: Callable[[str], object]) -> str | None:
    """torch.compile's mode, or None for eager.

    auto compiles on a GPU and stays eager on a CPU, where no gain was measured that would pay for compiling
    (benchmarks/LOG.md). Where no compiler is there, falls back to eager and says so in one line.
    """
    if requested == "off" or (requested == "auto" and device.type == "cpu"):
        return None
    reason = compiler_available(device)
    if reason is not None:
        announce(f"torch.compile: {reason}; running eager")
        return None
    return "default" if requested == "auto" else requested
