"""A benchmark an operator."""
