"""Gaussians over weights: what a curvature is, priors, the two together, their evidence, and files."""
