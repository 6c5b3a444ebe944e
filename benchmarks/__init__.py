"""Measurements: each script prints a table and leaves one JSON file under benchmarks/results/."""
