"""What does not work on this machine, and what takes its place."""

from collections.abc import Callable

from fasttrain.errors import UserError


class Fallbacks:
    """Called with a line for each accelerator that fails: what, why, what replaces it, and what that costs.

    log: called with each line. allowed: whether anything may be replaced (--no-fallback).
    lines: all so far.
    """

    def __init__(self, log: Callable[[str], object] = print, *, allowed: bool = True) -> None:
        self.lines: list[str] = []
        self._log, self._allowed = log, allowed

    def __call__(self, line: str) -> None:
        """Log a line and keep it. Raises UserError with it if nothing may be replaced."""
        if not self._allowed:
            raise UserError(f"--no-fallback: {line}")
        self.lines.append(line)
        self._log(line)
