"""From images on disk to batches on the device: fetch, verify, decode, augment."""
