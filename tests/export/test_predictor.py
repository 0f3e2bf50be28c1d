"""What is compiled, exported or packaged predicts as the model does, also where no model code is loaded."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vpfast
from vpfast.models import MSPN, SHRVQVAE, MSPNConfig, Predictor, SHRVQVAEConfig
from vpfast.models.shrvqvae import sample
from vpfast.ops import _native
from vpfast.ops._backend import BackendError

ROOT = Path(__file__).parents[2]
LOADER = ROOT / "examples/load_package.py"
HORIZON = 2
FRAMES = torch.rand(2, 2, 1, 8, 12, generator=torch.Generator().manual_seed(1))
FIRST = FRAMES[:, :1].clone()
PIXELS: dict[str, Any] = {"in_channels": 1, "channels": (4, 6, 8), "levels": 2, "hidden_channels": 4}
CODES: dict[str, Any] = {
    "channels": (4, 8),
    "residual_channels": 4,
    "residual_blocks": 1,
    "prior_channels": 8,
    "prior_blocks": 2,
    "prior_attention_every": 2,
    "prior_heads": 2,
    "prior_head_dim": 4,
    "prior_ffn": 8,
    "prior_head": 8,
}


def codes(**changes: Any) -> SHRVQVAE:
    """An untrained S-HR-VQVAE whose codes differ from place to place."""
    torch.manual_seed(0)
    model = SHRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", **{**CODES, **changes}))
    model.autoencoder.train()(torch.rand(64, 1, 1, 8, 12))  # the first batch starts the codebooks
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.mul_(1.5)  # far from uniform
    return model.eval()


def pixels(**changes: Any) -> MSPN:
    torch.manual_seed(0)
    return MSPN(MSPNConfig(**{**PIXELS, **changes})).eval()


# Compiling takes time with the number of different layers.
LITTLE: dict[Any, dict[str, Any]] = {
    pixels: {"levels": 1, "channels": (4, 6)},
    codes: {"channels": (4,), "layers": 2, "prior_blocks": 1, "prior_attention_every": 1},
}
needs_kernels = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")
each_model = pytest.mark.parametrize(
    "make", [pytest.param(pixels, id="MSPN"), pytest.param(codes, id="S-HR-VQVAE", marks=needs_kernels)]
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def in_a_new_process(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def predicted_elsewhere(package: Path, frames: Tensor) -> Tensor:
    """By the example, in a process of its own, which fails where code of a model is imported there."""
    source, target = package.with_name("frames.npy"), package.with_name("prediction.npy")
    np.save(source, frames.numpy())
    in_a_new_process(LOADER, package, source, target)
    return torch.from_numpy(np.load(target))


def test_operators_load_no_model_and_the_rest_comes_when_asked_for() -> None:
    in_a_new_process(
        "-c",
        "import sys, vpfast, vpfast.ops\n"
        "assert not [name for name in sys.modules if name.startswith(('vpfast.models', 'vpfast.nn'))]\n"
        "assert {'models', 'nn', 'Stream', 'optimize'} <= set(dir(vpfast))\n"
        "assert vpfast.models.MSPN and vpfast.nn.EDLSTMCell and callable(vpfast.Stream) and callable(vpfast.optimize)\n"
        "assert not hasattr(vpfast, 'nothing')\n",
    )


@each_model
def test_compiled_as_one_graph(make: Any) -> None:
    model = make(**LITTLE[make])
    compiled = torch.compile(Predictor(model, HORIZON), fullgraph=True)
    torch.testing.assert_close(compiled(FIRST), model.predict(FIRST, HORIZON), atol=1e-5, rtol=1e-5)


@each_model
def test_exported_and_loaded_where_no_model_is(make: Any, tmp_path: Path) -> None:
    model = make()
    program = Predictor(model, HORIZON).export(FRAMES[:1])
    torch.export.save(program, tmp_path / "model.pt2")
    for batch in (1, 2, 3):
        frames = FRAMES[:1].repeat(batch, 1, 1, 1, 1) * torch.linspace(0.2, 1, batch)[:, None, None, None, None]
        assert torch.equal(program.module()(frames), model.predict(frames, HORIZON))
    assert torch.equal(predicted_elsewhere(tmp_path / "model.pt2", FRAMES), model.predict(FRAMES, HORIZON))


@each_model
def test_packaged_and_loaded_where_no_model_is(make: Any, tmp_path: Path) -> None:
    model = make(**LITTLE[make])
    package = Predictor(model, HORIZON).package(FIRST, tmp_path / "model.pt2")
    predicted = predicted_elsewhere(package, FIRST)
    torch.testing.assert_close(predicted, model.predict(FIRST, HORIZON), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="unmatched dim value at 1, expected: 1, but got: 2"):
        predicted_elsewhere(package, FRAMES)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


VARIANTS = {
    "MSPN of the other recurrence": lambda: pixels(recurrence="enc_lstm_dec"),
    "MSPN with the frame fed": lambda: pixels(feed_frame=True, batch_norm=True),
    "MSPN in channels_last": lambda: pixels().to(memory_format=torch.channels_last),
    "codes layer by layer": lambda: codes(**LITTLE[codes], code_order="layers", attention="window"),
    "codes independent of each other": lambda: codes(**LITTLE[codes], code_order="independent", attention="axial"),
    "codes without attention, in float64": lambda: codes(**LITTLE[codes], attention="none").double(),
}


@needs_kernels
@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_is_exported(make: Any) -> None:
    model = make()
    frames = FRAMES.to(next(model.parameters()).dtype)
    assert torch.equal(Predictor(model, HORIZON).export(frames).module()(frames), model.predict(frames, HORIZON))


def test_frames_that_come_at_once_need_no_kernel() -> None:
    model = codes(conditioning="past_frames")
    with vpfast.backend("reference"):
        program = Predictor(model, HORIZON).export(FRAMES)
        assert torch.equal(program.module()(FRAMES), model.predict(FRAMES, HORIZON))


@needs_kernels
def test_values_that_are_not_finite_end_what_was_exported() -> None:
    for message in ("the encoder gives values", "the prior gives logits"):
        model = codes(**LITTLE[codes])
        broken = model.prior.mix[1].weight if "prior" in message else model.autoencoder.encoder[0].weight
        program = Predictor(model, HORIZON).export(FRAMES)
        assert torch.isfinite(program.module()(FRAMES)).all()
        with torch.no_grad():
            broken.fill_(torch.nan)
        program = Predictor(model, HORIZON).export(FRAMES)
        with pytest.raises((RuntimeError, ValueError), match=message):
            program.module()(FRAMES)


def test_what_no_kernel_serves_is_refused() -> None:
    with pytest.raises(BackendError, match="conditioning='eq6'"):
        Predictor(codes(conditioning="eq6"), HORIZON).export(FRAMES)
    with vpfast.backend("reference"), pytest.raises(BackendError, match=r"vpfast.backend\('reference'\)"):
        Predictor(codes(), HORIZON).export(FRAMES)
    with pytest.raises(BackendError, match="float16"):
        Predictor(codes().half(), HORIZON).export(FRAMES.half())


def test_a_predictor_is_a_copy_without_gradients() -> None:
    model = pixels()
    predictor = Predictor(model, HORIZON)
    before = predictor(FRAMES)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(predictor(FRAMES), before)
    assert not torch.equal(model.predict(FRAMES, HORIZON), before)


def test_without_a_compiler_nothing_is_packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "g++")))
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler was found.*install g\+\+"):
        Predictor(pixels(), 1).package(FRAMES, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = pixels()
    with pytest.raises(TypeError, match="takes an MSPN or an SHRVQVAE, got Conv2d"):
        Predictor(torch.nn.Conv2d(1, 1, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"call model\.eval"):
        Predictor(pixels().train(), 1)
    with pytest.raises(ValueError, match="horizon must be 1 or more, got 0"):
        Predictor(model, 0)
    predictor = Predictor(model, 1)
    with pytest.raises(ValueError, match="3 channels"):
        predictor.export(FRAMES.repeat(1, 1, 3, 1, 1))
    with pytest.raises(ValueError, match="T = 0"):
        predictor.export(FRAMES[:, :0])
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        predictor.package(FRAMES, tmp_path / "model.zip")
    with pytest.raises(FileExistsError, match="there is no folder"):
        predictor.package(FRAMES, tmp_path / "nowhere" / "model.pt2")
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_the_kernel_writes_what_its_operator_says_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    original = torch.ops.vpfast.sample_frame
    monkeypatch.setattr(torch.ops.vpfast, "sample_frame", lambda *given: calls.append(given) or original(*given))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = codes()
    sample(model.prior, model.autoencoder.indices(FRAMES), HORIZON)
    monkeypatch.undo()
    assert len(calls) == HORIZON
    torch.library.opcheck(original.default, calls[-1], test_utils=("test_schema", "test_faketensor"))
