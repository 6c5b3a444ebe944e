"""The fastest honest way to train an image classifier on one GPU."""

__version__ = "0.1.0"
