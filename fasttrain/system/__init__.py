"""The machine and its files: devices, precision, rates, signals, folders, logs."""
