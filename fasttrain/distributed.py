"""One training on several processes started by torchrun: ranks, reductions, and how the ranks end together.

A recipe's batch size is that of all ranks together: every rank trains on its share, and
DistributedDataParallel averages the gradients, so the learning rate stays the same. A world of one has no
process group and no overhead.

    torchrun --nproc-per-node 8 -m fasttrain train

When a rank dies, torchrun notices within a second, names the rank and the signal or exit status, and sends
the others SIGTERM and, 30 s later, SIGKILL. The other ranks do not wait for that. gloo, which transfers
everything in the host's memory, fails as soon as the connection breaks. NCCL reports nothing, so torch's
watchdog ends the process after ANSWER_SECONDS. That also covers a rank that hangs and a machine that
disappears. torchrun knows nothing of a rank that hangs, so the others find out which one it is. Before the
training, ranks wait for each other as long as all of them give signs of life.
"""

import atexit
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttrain.data.sampler import Shard
from fasttrain.errors import DivergedError, LostRankError, TrainingInterrupted, UserError
from fasttrain.system import roll_call
from fasttrain.system.console import reader_may_leave
from fasttrain.system.signals import die_of_signals, ignore_sigterm

T = TypeVar("T")

ANSWER_SECONDS = 18
"""How long a rank waits for the others during the training, and before it for a sign of life."""

START_SECONDS = 3600
"""How long a rank waits before the training: the first may download images, search a rate, or compile."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass
class World:
    """The processes that train together, seen from one of them; without arguments, a world of one.

    local_rank: the rank within its machine.
    is_training: whether all ranks train, and do nothing that takes long without the others.
    All ranks must call all methods except `print`, in the same order. As a context manager, it
    turns the loss of another rank into a LostRankError.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_training: bool = field(default=False, init=False)

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Join the world that torchrun's environment describes; without torchrun, return a world of one.

        device: cpu or cuda; each rank takes the GPU of its local rank. A process may join several times, for
        one training after the other.
        Raises UserError if the environment is incomplete, or if the ranks cannot use this device.
        """
        size = _environment("WORLD_SIZE", 1)
        if size == 1:
            return cls(device=device)
        rank, local_rank = _environment("RANK"), _environment("LOCAL_RANK")
        if device.type not in BACKENDS:
            raise UserError(f"--device {device.type}: trains on one rank only; start without torchrun")
        if device.type == "cuda":
            if device.index:
                raise UserError(f"--device {device}: expected auto, cuda or cpu: each rank takes its own GPU")
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"--nproc-per-node: rank {rank} has local rank {local_rank} on a machine with "
                    f"{torch.cuda.device_count()} GPUs; start one rank per GPU"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        try:
            if dist.is_initialized():
                _set_timeout(START_SECONDS)
            else:
                with die_of_signals():
                    dist.init_process_group(BACKENDS[device.type], timeout=timedelta(seconds=START_SECONDS))
            roll_call.give_signs(rank)
            return cls(rank, size, local_rank, device)
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "connect" in str(error).lower():
                _raise_if_lost(error)
            raise  # gloo also fails over an address that is not there

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This rank's part of every batch."""
        return Shard(self.rank, self.size)

    def print(self, line: str) -> None:
        """Print a line, only on the first rank."""
        if self.is_main:
            with reader_may_leave():
                print(line, flush=True)

    def share(self, batch_size: int) -> int:
        """Return this rank's number of images per batch. Raises UserError if the batch cannot be divided."""
        share, left = divmod(batch_size, self.size)
        if left or share < 2:
            sizes = [size for size in (share * self.size, (share + 1) * self.size) if size >= 2 * self.size]
            choices = " or ".join(map(str, sizes or [2 * self.size]))
            raise UserError(
                f"--batch-size {batch_size}: expected the same number of images, at least 2, on each of "
                f"{self.size} ranks; use {choices}"
            )
        return share

    # ------------------------------------------------------------------------------------------ agreement

    def broadcast(self, work: Callable[[], T]) -> T:
        """Call `work` only on the first rank, and return its result on every rank."""
        if self.size == 1:
            return work()
        box = [work() if self.is_main else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]  # the first rank's

    def main_first(self, work: Callable[[], T]) -> T:
        """Call `work` on each machine's first rank, then on its others, so that the first can write files."""
        if self.local_rank == 0:
            value = work()
            self.barrier()
            return value
        self.barrier()
        return work()

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks, on every rank."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.all_reduce_max(0)

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the element-wise maximum over all ranks. Waits for the ranks, but not for the device."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values)
        with self._exchange():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, naming the differences, on every rank whose facts differ from the first rank's."""
        first = self.broadcast(lambda: facts)
        differing = [
            f"{key} is {value}, not {first[key]}" for key, value in facts.items() if value != first[key]
        ]
        if differing:
            raise UserError(
                f"this rank would not train the same as rank 0: {', '.join(differing)}; "
                "give all ranks the same command, files and versions"
            )

    # ------------------------------------------------------------------------------------------ arithmetic

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks as a new tensor; a world of one returns `values` itself."""
        if self.size == 1:
            return values
        values = values.clone()
        with self._exchange():
            dist.all_reduce(values)
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """Return the minimum over all ranks as a new tensor; a world of one returns `values` itself."""
        if self.size == 1:
            return values
        values = values.clone()
        with self._exchange():
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the network with its gradients averaged over all ranks in every backward pass.

        Parameters are set to the first rank's at the start. Buffers, such as BatchNorm's statistics, remain
        each rank's own until broadcast_buffers.
        """
        if self.size == 1:
            return model
        with self._exchange(), warnings.catch_warnings():
            # torch 2.13 wants the name forward_sync_buffers, which torch 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the first rank's buffers to every rank, so that all of them evaluate the same network."""
        if self.size == 1:
            return
        with self._exchange():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def synchronize_batchnorm(self, model: nn.Module) -> None:
        """Make BatchNorm use the mean and variance over all ranks' batches; in place, with the same keys."""
        if self.size == 1:
            return
        # torch's own class is for GPUs only.
        batchnorm = nn.SyncBatchNorm if self.device.type == "cuda" else _SyncBatchNorm
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    synced = batchnorm(child.num_features, child.eps, child.momentum).to(child.weight.device)
                    synced.load_state_dict(child.state_dict())
                    setattr(module, name, synced)

    # ----------------------------------------------------------------------------------- beginning and end

    def begin(self) -> None:
        """Wait until every rank is ready to train; from then on they answer within ANSWER_SECONDS, or end."""
        if self.size == 1:
            return
        self.barrier()
        _set_timeout(ANSWER_SECONDS)
        self.is_training = True

    def close(self) -> None:
        """Leave the world once all ranks have called this.

        The process group is destroyed when the process ends: torch 2.13 can hang while a network still holds
        it.
        """
        if self.size > 1:
            roll_call.leave(self.rank)
            self.barrier()
            atexit.unregister(dist.destroy_process_group)
            atexit.register(dist.destroy_process_group)

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DivergedError | TrainingInterrupted):  # every rank raises these
            self.close()
        elif error is not None:
            _raise_if_lost(error)

    @contextmanager
    def report_lost_rank(self) -> Iterator[None]:
        """Within the block, a broken connection becomes a LostRankError; SIGTERM is then ignored."""
        try:
            yield
        except RuntimeError as error:
            _raise_if_lost(error)
            raise

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Within the block, all ranks transfer something; before the training, it waits for them first."""
        with self.report_lost_rank():
            if not self.is_training and (lost := roll_call.wait_for_all(ANSWER_SECONDS)) is not None:
                ignore_sigterm()
                reason = f"no sign of life for {ANSWER_SECONDS} s" if lost else "torch's store is silent"
                raise LostRankError(_lost(lost, reason, "it has ended, is stopped or hangs"))
            yield


def _raise_if_lost(error: BaseException) -> None:
    """Raise LostRankError if this is torch's or gloo's error for one; SIGTERM is ignored from then on."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if not isinstance(error, dist.DistError) and not is_gloo:
        return
    ignore_sigterm()  # torchrun's, which follows: this rank ends by itself, and says why
    # Its first sentence, without gloo's place in its sources; more sentences guess at the cause.
    reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0].rstrip(".")
    why = "see above, or in torchrun's summary, why it ended"
    if "timed out" in reason.lower():
        why = "it does not answer, and may be stopped or hang"
    raise LostRankError(_lost(roll_call.missing_ranks(), reason, why)) from error


def _lost(ranks: list[int], reason: str, why: str) -> str:
    """The line for these ranks, or for one that is not known."""
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "another rank"
    return f"lost {names} ({reason}): {why}"


def _set_timeout(seconds: float) -> None:
    # A second group would need a second communicator. torch 2.13 has no public function that does this.
    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=seconds))


def _environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not str(text).isdigit():
        raise UserError(f"the environment has WORLD_SIZE but {name}={text}: start the ranks with torchrun")
    return int(text)


class _MeanOverRanks(torch.autograd.Function):
    """The mean over all ranks; its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class _SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, which have the same size, like nn.SyncBatchNorm."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images_NCHW)
        x = images_NCHW.float()
        mean_C = _MeanOverRanks.apply(x.mean((0, 2, 3)))
        centred = x - mean_C[:, None, None]
        variance_C = _MeanOverRanks.apply(centred.square().mean((0, 2, 3)))
        self._follow(mean_C.detach(), variance_C.detach(), x.numel() // x.shape[1] * dist.get_world_size())
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        return (centred * scale_C[:, None, None] + self.bias[:, None, None]).to(images_NCHW.dtype)

    def _follow(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        """Update the running statistics with the unbiased variance, like nn.BatchNorm2d."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * (count / (count - 1)), self.momentum)
