"""Triton kernels, one file an operator, imported when first needed. Installed as ``vpfast.kernels``."""
