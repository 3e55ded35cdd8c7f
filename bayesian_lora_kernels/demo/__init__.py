"""The demonstration: a small language model, fine-tuned until it is overconfident, becomes calibrated.

Everything happens on the spot, from text that every Python installation has: its standard library.
"""
