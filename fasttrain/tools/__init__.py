"""The commands other than `train`, with one module per command."""
