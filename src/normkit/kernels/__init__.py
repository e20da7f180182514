"""Kernels by the shape of the work; they never know which norm they serve."""
