"""How a recipe runs on this machine: device, precision, loader, compiler and CUDA graph, decided once."""

import contextlib
import importlib
import threading
from dataclasses import dataclass, field

import torch

from fasttrain.data.build_loader import LoaderName, pick_loader
from fasttrain.distributed import World
from fasttrain.optim import fused_fails
from fasttrain.recipe import Recipe
from fasttrain.system.compiler import pick_compile_mode
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.memory import pinning_fails
from fasttrain.system.precision import DTYPES, fails_in, pick_precision, prepare

OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch.compile captures its own CUDA graphs."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The decisions for this machine.

    precision: that of the matrix products: bf16, fp16, fp32 or tf32. loader: dali or tensor.
    compile_mode: torch.compile's mode; None for eager.
    cuda_graph: whether to capture the whole training step as a CUDA graph.
    fused_optimizer: whether one kernel updates all parameters of a group, and one the average of the weights.
    fallbacks: takes a line for whatever fails here and is replaced.
    """

    device: torch.device
    precision: str = "fp32"
    loader: LoaderName = "tensor"
    compile_mode: str | None = None
    cuda_graph: bool = False
    fused_optimizer: bool = True
    fallbacks: Fallbacks = field(default_factory=Fallbacks, compare=False, repr=False)

    @classmethod
    def resolve(
        cls,
        recipe: Recipe,
        device: torch.device,
        *,
        precision: str | None = None,
        trains: bool = True,
        compiles: bool = True,
        num_ranks: int = 1,
        fallbacks: Fallbacks | None = None,
    ) -> "Runtime":
        """Decide everything that the recipe leaves to the machine, and set up this process for it.

        What can fail is tried once, and replaced if it fails; torch.compile and the capture of a CUDA graph
        are tried on the step itself (compile.py).

        precision: the precision to compute in; by default chosen from the recipe's compute_dtype.
        trains: whether there will be training steps. compiles: whether they will be compiled and captured.
        fallbacks: by default anything may be replaced, and lines are printed.
        Raises UserError if something fails that the recipe asks for by name, or that may not be replaced.
        """
        fallbacks = fallbacks or Fallbacks()
        precision = precision or pick_precision(recipe.compute_dtype, device, fallbacks)
        prepare(device, precision)
        if device.type == "cuda" and (failure := pinning_fails()):
            fallbacks(f"pinned memory: {failure}", "the host waits for every copy to the GPU and back")
        unfused = fused_fails(device) if trains else None
        if unfused:
            fallbacks(
                f"optimizer: {unfused}", "using the unfused one, which launches more kernels for a step"
            )
        compiles = trains and compiles
        compile_mode = pick_compile_mode(recipe.compile if compiles else "off", device, fallbacks)
        return cls(
            device=device,
            precision=precision,
            loader=pick_loader(recipe.loader, device, fallbacks),
            compile_mode=compile_mode,
            cuda_graph=compiles and can_capture(recipe, device, compile_mode, num_ranks),
            fused_optimizer=not unfused,
            fallbacks=fallbacks,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products; tf32 is a way to multiply float32."""
        return DTYPES[self.precision]


def agree_on_precision(recipe: Recipe, world: World, fallbacks: Fallbacks) -> str:
    """Return the recipe's precision here. A CPU measures it, so all ranks use the first one's choice."""
    own = pick_precision(recipe.compute_dtype, world.device, fallbacks)
    picked = world.broadcast(lambda: own)
    failures = [failure for failure in world.gather(fails_in(picked, world.device)) if failure]
    if not failures:
        return picked
    fallbacks(f"precision: {failures[0]}", "all ranks compute in fp32, which may be slower")
    return "fp32"


def can_capture(recipe: Recipe, device: torch.device, compile_mode: str | None, num_ranks: int = 1) -> bool:
    """Return whether to capture the whole step as a CUDA graph; DistributedDataParallel's steps are not."""
    return recipe.cuda_graph and device.type == "cuda" and compile_mode not in OWN_GRAPHS and num_ranks == 1


def import_in_background(*modules: str) -> None:
    """Import modules on a thread, while the images are read.

    The data path needs DALI and the first optimizer needs torch._dynamo, which take half a second or more
    each.
    """

    def work() -> None:
        for module in modules:
            with contextlib.suppress(Exception):  # reported where it is needed, unless the process ends now
                importlib.import_module(module)

    threading.Thread(target=work, name="imports").start()
