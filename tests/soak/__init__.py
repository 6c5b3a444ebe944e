"""Killed runs, corrupt files and memory, for minutes: `make soak`."""
