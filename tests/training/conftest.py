"""The smallest run that has every part of a real one."""

import dataclasses
from pathlib import Path

import pytest

from vpfast.training import DataConfig, TrainConfig, log

CODES = {"name": "hrvqvae", "channels": [4], "residual_channels": 4, "latent_channels": 3, "codebook_size": 3}


@pytest.fixture(scope="module", autouse=True)
def _unpainted():
    """No run paints its curves, which takes longer than the run; what would be painted is asserted in test_log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "write_curves", lambda path, panels, **how: Path(path).touch())
        yield


@pytest.fixture
def tiny_codes(tiny):
    """The same of an HR-VQVAE; ``model`` holds changes to the network."""

    def make(model=None, **changes):
        return tiny(model={**CODES, **(model or {})}, horizon=0, **changes)

    return make


@pytest.fixture
def tiny(tmp_path, small):
    """Makes a configuration of a few seconds; keyword arguments change it."""

    def make(**changes):
        return dataclasses.replace(small(tmp_path), **changes)

    return make


@pytest.fixture(scope="session")
def small():
    """Makes the configuration of a few seconds in a folder."""
    return _small


def _small(folder):
    return TrainConfig(
        out=str(folder / "run"),
        model={"channels": [4, 8], "levels": 1, "hidden_channels": 4},
        data=DataConfig(size=16, digit_size=8, digits=1, clips=20),
        context=3,
        horizon=2,
        steps=6,
        batch_size=2,
        device="cpu",
        val_every=3,
        val_clips=3,
        save_every=2,
    )
