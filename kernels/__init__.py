"""Triton kernels, a file an operator and its parts, imported when needed. Installed as ``vpfast.kernels``."""
