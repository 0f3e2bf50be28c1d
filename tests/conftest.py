"""Shared by every test: where the shared material is, and determinism of hypothesis in CI."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).parents[2] / "shared"

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of papers' data and fixtures beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder, not found at {SHARED}")
    return SHARED
