"""`fasttrain` and `python -m fasttrain`: the command line, from its first import on."""

import sys

from fasttrain.system.signals import leave_on_signals


def main() -> int:
    """Run the command that the process was started with; returns the exit status."""
    with leave_on_signals():
        from fasttrain.cli import main
    return main()


if __name__ == "__main__":
    sys.exit(main())
