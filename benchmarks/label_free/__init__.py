"""Temperatures without held-out labels; docs/label-free.md."""
