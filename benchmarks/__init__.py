"""Measurements: each script prints a table and leaves one JSON file. README.md says what each measures."""
