"""What the campaigns share: turns that a seed determines, a time to end, and what went wrong."""

import random
import sys
import time
import traceback
from typing import Any, Protocol


class Campaign(Protocol):
    """One kind of faults. results: its figures so far, with `wrong`, a line for each wrong outcome."""

    name: str
    results: dict[str, Any]

    def turn(self, number: int, rng: random.Random) -> None:
        """Inject the faults of one turn, chosen by `rng`, and add what came of them to the results."""


def run_for(campaign: Campaign, seconds: float, seed: int, *, only: int | None = None) -> None:
    """Take turns for so long, at least one. only: take this turn alone.

    Each wrong outcome is printed with the command that takes its turn again.
    """
    deadline, number = time.perf_counter() + seconds, 0 if only is None else only
    while True:
        known = len(campaign.results["wrong"])
        try:
            campaign.turn(number, random.Random(f"{seed} {number}"))
        except Exception as error:  # of the campaign itself, whose other turns count all the same
            traceback.print_exc()
            campaign.results["wrong"].append(f"turn {number} broke off: {type(error).__name__}: {error}")
        for wrong in campaign.results["wrong"][known:]:
            again = f"python -m tests.soak --only {campaign.name} --seed {seed} --turn {number}"
            print(f"{wrong}; again: {again}", file=sys.stderr)
        number += 1
        if only is not None or time.perf_counter() >= deadline:
            return
