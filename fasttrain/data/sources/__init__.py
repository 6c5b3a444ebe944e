"""Where images come from: CIFAR's releases, a generated stand-in, folders, tar files."""
