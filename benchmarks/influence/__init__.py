"""Influence against retraining, and and beside kronfluence and bergson."""
