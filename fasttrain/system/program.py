"""How this program is called from the user's shell, so that the commands in our messages work when pasted."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return `fasttrain` if the shell finds this installation by that name, else `PYTHON -m fasttrain`."""
    script, python = Path(sys.argv[0]), Path(sys.executable)
    if script.name != "fasttrain":
        script = python.with_name("fasttrain")
    found = shutil.which("fasttrain")
    if found and script.exists() and Path(found).samefile(script):
        return "fasttrain"
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m fasttrain"


def typed(*words: str) -> str:
    """Return the command that calls this program with these arguments, to be pasted into the user's shell."""
    return f"{program()} {shlex.join(words)}"


def typed_for_all_ranks(*words: str) -> str:
    """Return the command for as many ranks as now; on several machines the user adds where they meet."""
    size, local_size = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if size == 1:
        return typed(*words)
    nodes = ["--nnodes", str(size // int(local_size))] if size > int(local_size) else []
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", local_size, "-m", "fasttrain", *words])
