"""One training on several processes, as torchrun starts them: ranks, reductions, and how they end together.

A recipe's batch is the whole job's: every rank trains on its share, and DistributedDataParallel averages the
gradients, so the learning rate stays what it was. A world of one has no process group and no cost.

    torchrun --nproc-per-node 8 -m fasttrain train

A dead rank: torchrun notices within a second, names the rank and the signal or exit status, and sends SIGTERM
to the others, SIGKILL 30 s later. They do not wait for that. gloo, which carries all that lies in the host's
memory, fails as soon as the connection breaks; NCCL, which tells nobody, after ANSWER_SECONDS, when torch's
watchdog ends the process. That also covers a rank that hangs, and a machine that is gone.
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
from fasttrain.errors import DivergedError, Interrupted, UserError
from fasttrain.system.signals import ignore_sigterm

T = TypeVar("T")


ANSWER_SECONDS = 20
"""How long a rank waits for the others while they train."""


START_SECONDS = 3600
"""The same before they train: the first rank may download the images, find a rate, compile."""


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it; without arguments, a world of one.

    local_rank: counted on its own machine. All methods but `print` and `parallel` are for all ranks at once,
    in the same order. As a context it turns the loss of another rank into a UserError.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The world that torchrun's environment describes; without torchrun a world of one.

        device: cpu or cuda; each rank takes the GPU of its local rank. One training after the other may join.
        Raises UserError if the environment is incomplete, or if the ranks cannot have this device.
        """
        size = _environment("WORLD_SIZE", 1)
        if size == 1:
            return cls(device=device)
        rank, local_rank = _environment("RANK"), _environment("LOCAL_RANK")
        if device.type not in BACKENDS:
            raise UserError(f"--device {device.type}: trains on one rank only; start it without torchrun")
        if device.type == "cuda":
            if device.index:
                raise UserError(f"--device {device}: expected auto, cuda or cpu: each rank takes its own GPU")
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"--nproc-per-node: rank {rank} is number {local_rank} on its machine, which has "
                    f"{torch.cuda.device_count()} GPUs; start as many ranks as there are GPUs"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        if dist.is_initialized():
            _set_timeout(START_SECONDS)
        else:
            dist.init_process_group(BACKENDS[device.type], timeout=timedelta(seconds=START_SECONDS))
        return cls(rank, size, local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        return Shard(self.rank, self.size)

    def print(self, line: str) -> None:
        """Print, on the first rank only."""
        if self.is_main:
            print(line)

    def share(self, batch_size: int) -> int:
        """How many of a batch's images are this rank's. Raises UserError if they cannot be dealt out."""
        share, left = divmod(batch_size, self.size)
        if left or share < 2:
            sizes = [size for size in (share * self.size, (share + 1) * self.size) if size >= 2 * self.size]
            take = " or ".join(map(str, sizes or [2 * self.size]))
            raise UserError(
                f"--batch-size {batch_size}: expected the same number of images, at least 2, on each of "
                f"{self.size} ranks; take {take}"
            )
        return share

    # ------------------------------------------------------------------------------------------ agreement

    def broadcast(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, where alone it is called."""
        if self.size == 1:
            return work()
        box = [work() if self.is_main else None]
        with self.report_lost_rank():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]  # the first rank's

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, called on every machine's first rank before its others: it may write files."""
        if self.local_rank == 0:
            value = work()
            self.barrier()
            return value
        self.barrier()
        return work()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on all of them."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        with self.report_lost_rank():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_max(0)

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of all ranks' values, place by place. Waits for the ranks, but not for the device."""
        if self.size == 1:
            return list(values)
        most = torch.tensor(values)
        with self.report_lost_rank():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.tolist()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError, naming the difference, where another rank's facts are not the first one's."""
        first = self.broadcast(lambda: facts)
        differing = [
            f"{key} is {value}, not {first[key]}" for key, value in facts.items() if value != first[key]
        ]
        if differing:
            raise UserError(
                f"this rank would not train what rank 0 does: {', '.join(differing)}; "
                "give all ranks the same command, files and versions"
            )

    # ------------------------------------------------------------------------------------------ arithmetic

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's values, as a new tensor."""
        if self.size == 1:
            return values
        values = values.clone()
        with self.report_lost_rank():
            dist.all_reduce(values)
        return values

    def all_reduce_min(self, values: Tensor) -> Tensor:
        """The smallest of all ranks' values, as a new tensor."""
        if self.size == 1:
            return values
        values = values.clone()
        with self.report_lost_rank():
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        """The network with gradients that are means over all ranks after every backward pass.

        Parameters are the first rank's from the start. Buffers, which BatchNorm's statistics are, stay each
        rank's own until broadcast_buffers.
        """
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.13 would have it called forward_sync_buffers, which torch 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers, so that all evaluate one network."""
        if self.size == 1:
            return
        with self.report_lost_rank():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def synchronize_batchnorm(self, model: nn.Module) -> None:
        """Let BatchNorm take its mean and variance over the batches of all ranks, in place, same keys."""
        if self.size == 1:
            return
        kind = nn.SyncBatchNorm if self.device.type == "cuda" else _SyncBatchNorm  # torch's is for GPUs only
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    synced = kind(child.num_features, child.eps, child.momentum).to(child.weight.device)
                    synced.load_state_dict(child.state_dict())
                    setattr(module, name, synced)

    # ----------------------------------------------------------------------------------- beginning and end

    def begin(self) -> None:
        """Wait until every rank is ready to train; from here on they answer each other promptly, or end."""
        if self.size == 1:
            return
        self.barrier()
        _set_timeout(ANSWER_SECONDS)

    def close(self) -> None:
        """Part from the other ranks, when all are here.

        The group itself goes when the process ends: while a network holds it, torch 2.13 can hang over it.
        """
        if self.size > 1:
            self.barrier()
            atexit.unregister(dist.destroy_process_group)
            atexit.register(dist.destroy_process_group)

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DivergedError | Interrupted):  # every rank is here
            self.close()
        elif error is not None:
            self._raise_if_lost(error)

    @contextmanager
    def report_lost_rank(self) -> Iterator[None]:
        """Within the block a broken connection is a UserError, and SIGTERM waits for it."""
        try:
            yield
        except RuntimeError as error:
            self._raise_if_lost(error)
            raise

    def _raise_if_lost(self, error: BaseException) -> None:
        said = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in said.lower()):
            ignore_sigterm()  # torchrun's, which follows: this rank ends by itself, and says why
            reason = said.splitlines()[0].rpartition("] ")[2] if "] " in said else said.splitlines()[0]
            raise UserError(
                f"lost another rank ({reason}): what ended that one stands above, or in "
                "torchrun's summary; what was saved remains, see --resume"
            ) from error


def _set_timeout(seconds: float) -> None:
    # No public call changes a group's timeout, and a second group would mean a second communicator.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def _environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not str(text).isdigit():
        raise UserError(f"the environment has WORLD_SIZE but {name}={text}: start the ranks with torchrun")
    return int(text)


def command(local: list[str]) -> list[str]:
    """The words that start, on as many ranks as here, what these words of fasttrain's start on one.

    Several machines need the user's own words about where they meet as well.
    """
    size, local_size = _environment("WORLD_SIZE", 1), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if size == 1:
        return ["fasttrain", *local]
    nodes = ["--nnodes", str(size // int(local_size))] if size > int(local_size) else []
    return ["torchrun", *nodes, "--nproc-per-node", local_size, "-m", "fasttrain", *local]


class _MeanOverRanks(torch.autograd.Function):
    """The mean of every rank's tensor; its gradient is the mean of their gradients."""

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
    """BatchNorm over the batches of all ranks, which are equally large. Source: as nn.SyncBatchNorm."""

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
        """Move the running statistics; theirs is the variance of a sample, as nn.BatchNorm2d has it."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * (count / (count - 1)), self.momentum)
        self.num_batches_tracked += 1
