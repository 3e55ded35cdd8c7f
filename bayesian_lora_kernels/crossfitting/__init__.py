"""Calibration without held-out labels: every training example is held out once."""
