"""Checkpoints: their file, what is in it, when one is written, and how a run goes on from one."""
