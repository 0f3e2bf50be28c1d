"""Shared by every test: where the shared material is, and determinism of hypothesis in CI."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's kernels run in its interpreter. It asks when it is imported, vpfast before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Real videos and a released checkpoint are not part of the repository: tests that need them look here, or skip.
SHARED = Path(os.environ.get("VPFAST_TEST_DATA", Path(__file__).parents[2] / "shared"))

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of papers' data and fixtures beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real data, not found at {SHARED} (VPFAST_TEST_DATA)")
    return SHARED
