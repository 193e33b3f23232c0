"""Fused layers: autograd functions that save and compute only what is asked for."""
