"""Questions that were asked once; nothing here is part of `make bench`."""
