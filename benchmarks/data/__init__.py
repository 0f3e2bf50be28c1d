"""Benchmarks of how clips reach a network."""
