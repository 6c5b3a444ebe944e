"""Writes the commit into the wheel and the sdist, so that results name it where there is no .git.

Everything else about the package is in pyproject.toml.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
COMMIT = Path("fasttrain", "commit.txt")
"""Only in what is built: in a checkout git knows better."""


def commit() -> str:
    """Return git's name of the commit, with `-dirty` if the sources have changed; else FASTTRAIN_COMMIT."""
    named = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        named = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return named or os.environ.get("FASTTRAIN_COMMIT", "")


def write_commit(folder: str) -> None:
    """Write the commit into a copy of the tree. If none is known, the copy keeps the one it came with."""
    if named := commit():
        path = Path(folder) / COMMIT
        path.unlink(missing_ok=True)  # an sdist links to the files of the tree
        path.write_text(named + "\n", encoding="utf-8")


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(self.build_lib)


class SdistWithCommit(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(base_dir)


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithCommit})
