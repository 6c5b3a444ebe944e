"""`fasttrain` and `python -m fasttrain`: the command line, from its first import on."""

import signal
import sys


def main() -> int:
    """Run the command that the process was started with; returns the exit status."""
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
