"""Whether torch.compile works on this machine, and which mode to use."""

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch

from fasttrain.errors import UserError
from fasttrain.system.fallbacks import Fallbacks

RUNNING_EAGER = "running eager, which launches more and smaller kernels"


def pick_compile_mode(requested: str, device: torch.device, fallbacks: Fallbacks) -> str | None:
    """Choose torch.compile's mode; None means eager.

    auto compiles on a GPU and stays eager on a CPU, where the measured gain did not pay for the compilation
    (docs/lab-notebook.md), nor where there is no compiler.
    Raises UserError if compiling was requested and there is no compiler.
    """
    if requested == "off" or (requested == "auto" and device.type == "cpu"):
        return None
    reason = compiler_available(device)
    if reason is not None:
        if requested != "auto":
            raise UserError(f"--compile {requested}: {reason}; or use --compile off")
        fallbacks(f"torch.compile: {reason}", RUNNING_EAGER)
        return None
    return "default" if requested == "auto" else requested


def compiler_available(device: torch.device) -> str | None:
    """Return None if torch.compile works on this device, else the reason and the remedy in one line."""
    # Imported here: these imports take a second, and only a few commands need them.
    from torch._dynamo import is_dynamo_supported
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if not is_dynamo_supported():
        return f"torch {torch.__version__} cannot compile on Python {platform.python_version()}"
    if device.type == "cuda":
        if not has_triton():
            return "no Triton for this GPU: pip install triton (needs compute capability 7.0)"
        # Triton compiles a small C launcher for every kernel.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler: install gcc, or set CC"
    elif device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler: install g++, or set CXX"
    else:
        return f"fasttrain does not compile for {device.type}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h: install Python's development files (python3-dev)"
    return None
