"""Weights, videos and a way to call the command line as a user would."""

import json

import numpy as np
import pytest
import torch

from vpfast.cli import main
from vpfast.models import HRVQVAE, MSPN, SHRVQVAE, MSPNConfig, SHRVQVAEConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint


@pytest.fixture
def command(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*args):
        code = main([str(arg) for arg in args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must be refused with exit code 2 and one line, which it returns."""

    def run(*args):
        code, _, err = command(*args)
        assert code == 2, err
        assert err.startswith("vpfast: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """An untrained network for 16x24 grey frames, three of them as context."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    config = TrainConfig(
        data=DataConfig(kind="video-folder", root="x", size=(16, 24)), context=3, horizon=2, val_every=0
    )
    checkpoint.write_weights(folder, model, config)
    return folder


@pytest.fixture(scope="session")
def code_weights(tmp_path_factory):
    """An untrained HR-VQVAE of three layers of four for 16x24 grey frames, its codebooks spread like its latent."""
    folder = tmp_path_factory.mktemp("code-weights")
    torch.manual_seed(0)
    model = HRVQVAE(
        SHRVQVAEConfig(in_channels=1, channels=(4, 8), residual_channels=4, latent_channels=4, codebook_size=4)
    )
    model.train()(torch.rand(64, 1, 1, 16, 24))  # the first batch starts the codebooks
    data = DataConfig(kind="video-folder", root="x", size=(16, 24))
    checkpoint.write_weights(folder, model, TrainConfig(data=data, context=2, horizon=0, val_every=0))
    return folder


@pytest.fixture(scope="session")
def future_weights(tmp_path_factory):
    """An untrained S-HR-VQVAE for 16x24 grey frames, three of them as context; its codebooks as above."""
    folder = tmp_path_factory.mktemp("future-weights")
    torch.manual_seed(0)
    small = {"prior_channels": 8, "prior_blocks": 1, "prior_attention_every": 1, "prior_heads": 2, "prior_head_dim": 4}
    model = SHRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", channels=(4, 8), residual_channels=4, **small))
    model.autoencoder.train()(torch.rand(64, 1, 1, 16, 24))
    data = DataConfig(kind="video-folder", root="x", size=(16, 24))
    how = TrainConfig(model={"name": "shrvqvae"}, stage="joint", data=data, context=3, horizon=2, val_every=0)
    checkpoint.write_weights(folder, model, how)
    return folder


@pytest.fixture
def video(tmp_path):
    """A grey film of 12 frames, 24 wide and 16 high, in which a bright column moves."""
    import av

    path = tmp_path / "film.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for index in range(12):
            picture = np.zeros((16, 24, 3), np.uint8)
            picture[:, index * 2 : index * 2 + 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def read_json():
    return lambda path: json.loads(path.read_text())
