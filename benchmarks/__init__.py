"""Timings beside what one would use otherwise: ``vpfast bench``. Installed as ``vpfast.benchmarks``."""
