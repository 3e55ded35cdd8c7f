"""Gaussians over weights: Kronecker-factored or in function space, their evidence, and files."""
