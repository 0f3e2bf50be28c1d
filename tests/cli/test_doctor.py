"""``vpfast doctor`` tells the truth about this installation, whole or broken."""

import importlib

from vpfast.cli import doctor
from vpfast.ops import _native


def test_every_operator_is_shown_with_the_backend_it_would_take(command):
    code, out, err = command("doctor")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for name in doctor.operators():
        backends = importlib.import_module(f"vpfast.ops.{name}.register").backends
        at = lines.index(name)
        assert lines[at + 1].split() == ["on", "cpu", backends.select("cpu")]
        for backend in ("native", "triton"):
            reason = backends.refusal(backend, "cuda")
            assert reason is None or reason in out


def test_the_build_record_is_told(command, monkeypatch):
    record = {"requested": "auto", "built": "none", "reason": "no C++ compiler was found", "cxx": None}
    monkeypatch.setattr(_native, "build_record", lambda: record)
    monkeypatch.setattr(_native, "extension", None)
    _, out, _ = command("doctor")
    assert "no C++ compiler was found" in out
    assert "the package was built without compiled kernels" in out
    assert f"not native: {_native.why_missing()}" in out


def test_an_extension_that_does_not_load_is_told(command, monkeypatch):
    monkeypatch.setattr(_native, "build_record", lambda: {"requested": "auto", "built": "cpu", "reason": "because"})
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "load_error", ImportError("undefined symbol: nothing"))
    code, out, _ = command("doctor")
    assert code == 0
    assert "does not load (undefined symbol: nothing)" in out


def test_extras_name_what_they_lack(monkeypatch):
    lines = ["torch>=2.11", "av; extra == 'cli'", "tqdm; extra == 'cli'", "vpfast[cli]; extra == 'demo'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "av")
    assert list(doctor._extras()) == [("cli", "lacks av: pip install 'vpfast[cli]'")]
    monkeypatch.setattr(doctor, "_installed", lambda package: True)
    assert list(doctor._extras()) == [("cli", "complete")]


def test_options_are_refused(refused):
    assert "--fast" in refused("doctor", "--fast")


def test_operators_are_the_functions_with_a_room():
    assert doctor.operators() == ["codeword_search", "edlstm_gates", "masked_attention3d"]
