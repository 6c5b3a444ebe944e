"""The commit that this package comes from: results, checkpoints and `fasttrain --version` name it."""

import os
from pathlib import Path

from fasttrain.system.command import output_of


def source_revision() -> tuple[str | None, bool | None]:
    """Find the commit that this package comes from, and whether its sources have changed since.

    In a checkout, git knows it. A wheel was built with it (setup.py). If you copy the tree without .git, set
    FASTTRAIN_COMMIT to the original's `git describe --always --abbrev=40 --exclude='*' --dirty`.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if not (checkout / ".git").exists():  # a copy; or installed, perhaps inside someone else's repository
        built = package / "commit.txt"
        named = built.read_text().strip() if built.exists() else os.environ.get("FASTTRAIN_COMMIT")
        return (named.removesuffix("-dirty"), named.endswith("-dirty")) if named else (None, None)
    git = ("git", "-C", str(checkout))
    commit = output_of(*git, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    # Benchmark results are not sources: the first benchmark's would make the tree look changed to the next.
    paths = ("--", ".", ":!benchmarks/results")
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no", *paths)
    return commit, None if changes is None else bool(changes)
