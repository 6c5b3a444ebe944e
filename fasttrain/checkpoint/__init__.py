"""Checkpoints: their files and content, when they are written, and how a run resumes from one."""
