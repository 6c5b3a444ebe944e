"""The sources of images: CIFAR's releases, a generated stand-in, folders, tar files."""
