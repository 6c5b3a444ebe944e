"""`fasttrain` and `python -m fasttrain`: the command line, from its first import on."""

import os
import signal
import sys
from contextlib import suppress


def main() -> int:
    """Run the command that the process was started with; returns the exit status, or ends the process.

    It ends at once after a signal: Python would wait for imports on threads, and take torch apart.
    """
    status = _run()
    if status > 128:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _run() -> int:
    try:
        from fasttrain.system.signals import leave_from_now_on, leave_on_signals, raise_on_signals

        with raise_on_signals():
            with leave_on_signals():
                from fasttrain.cli import main
            try:
                return main()
            finally:
                leave_from_now_on()
    except KeyboardInterrupt as stop:  # before or after all that
        signum = getattr(stop, "signum", signal.SIGINT)
        print(f"fasttrain: {signal.Signals(signum).name}: stopped", file=sys.stderr)
        return 128 + signum


if __name__ == "__main__":
    sys.exit(main())
