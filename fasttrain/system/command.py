"""Short commands of the system whose answer is worth having and not needed: git, nvidia-smi."""

import subprocess


def output_of(*command: str) -> str | None:
    """Return what the command prints, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
