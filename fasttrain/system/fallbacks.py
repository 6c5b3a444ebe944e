"""What does not work on this machine, and what takes its place."""

from collections.abc import Callable

from fasttrain.errors import UserError


class Fallbacks:
    """Called for each accelerator that is missing or fails here, and is replaced.

    log: called with a line about each. allowed: whether anything may be replaced (--no-fallback).
    lines: all so far.
    """

    def __init__(self, log: Callable[[str], object] = print, *, allowed: bool = True) -> None:
        self.lines: list[str] = []
        self._log, self._allowed = log, allowed

    def __call__(self, failure: str, instead: str) -> None:
        """Log a line and keep it. Raises UserError if nothing may be replaced.

        failure: what failed, and why. instead: what replaces it, and what that costs.
        """
        if not self._allowed:
            raise UserError(f"{failure}; --no-fallback allows nothing in its place")
        self.lines.append(f"{failure}; {instead}")
        self._log(self.lines[-1])
