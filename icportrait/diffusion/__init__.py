"""The diffusion process: samplers, a step of all rows of a batch, noise of a seed, and the mask of the reference.

NumPy only.
"""
