"""`fasttrain` and `python -m fasttrain`: the command line, from its first import on."""

import signal
import sys


def main() -> int:
    """Run the command that the process was started with; returns the exit status."""
    try:
        from fasttrain.system.signals import leave_on_signals

        with leave_on_signals():
            from fasttrain.cli import main
        return main()
    except KeyboardInterrupt:  # before these handlers, or after them
        print("fasttrain: SIGINT: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
