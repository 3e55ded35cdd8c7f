"""Benchmarks: what each command does is in README.md."""
