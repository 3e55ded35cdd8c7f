"""Influence against retraining, and beside kronfluence and bergson: `python -m benchmarks.influence --help`."""
