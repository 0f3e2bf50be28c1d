"""``vpfast doctor`` tells the truth about this installation, whole or broken."""

import importlib
import importlib.metadata

import torch

from vpfast.cli import doctor
from vpfast.ops import _backend, _gpu, _native


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
    lines = ["torch>=2.11", "av; extra == 'cli'", "tqdm; extra == 'cli'"]
    lines += ["av>=13; python_version < '3.11' and extra == 'cli'", "vpfast[cli]; extra == 'demo'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "av")
    assert list(doctor._extras()) == [("cli", "lacks av: pip install 'vpfast[cli]'")]
    monkeypatch.setattr(doctor, "_installed", lambda package: True)
    assert list(doctor._extras()) == [("cli", "complete")]


def test_options_are_refused(refused):
    assert "--fast" in refused("doctor", "--fast")


def test_operators_are_the_functions_with_a_room():
    assert doctor.operators() == ["codeword_search", "edlstm_gates", "masked_attention3d"]


def test_every_gpu_is_told_with_what_runs_there(command, monkeypatch):
    """On this machine's doubles: a GPU that the extension has code for, and one too old for everything."""
    capabilities = {0: (9, 0), 1: (7, 5)}

    class Properties:
        total_memory = 2**37

        def __init__(self, index):
            self.name, (self.major, self.minor) = f"GPU {index}", capabilities[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(_gpu, "capability", capabilities.get)
    monkeypatch.setattr(_gpu, "built_for", lambda: ("9.0a",))
    monkeypatch.setattr(_gpu, "cuda_versions", lambda: ("13.0", "13.1"))
    monkeypatch.setattr(_backend, "_HAS_TRITON", True)
    monkeypatch.setattr(_backend, "_INTERPRETED", False)
    monkeypatch.setattr(doctor, "_ask", lambda name, otherwise: otherwise)
    code, out, _ = command("doctor")
    assert code == 0
    for part in (
        "GPU 0, compute capability 9.0, 128 GiB",
        "compiled code (for 9.0a) runs there",
        "knows CUDA 13.1; compiled code is of CUDA 13.0",
        "compiled code (for 9.0a) does not run there",
        "Triton can compile for it",
        "Triton cannot compile for it",
        "not triton: Triton needs compute capability 8.0 or later, and GPU 1 has compute capability 7.5",
        "not native: this operator has no CUDA C++ kernel by design: on a GPU Triton serves it",
    ):
        assert part in out
    attention = out[out.index("\nmasked_attention3d\n") :].splitlines()
    assert [line.split(maxsplit=2)[2] for line in attention if line.startswith("  on cuda")] == [
        "triton",
        "none: an error",
    ]


def test_triton_is_told(command, monkeypatch):
    def version(package):
        if package == "triton":
            raise importlib.metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(_backend, "_HAS_TRITON", False)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    _, out, _ = command("doctor")
    assert "version              none: pip install triton" in out
    assert "not triton: Triton is not installed" in out
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda package: "3.6.0")
    monkeypatch.setattr(_backend, "_INTERPRETED", True)
    _, out, _ = command("doctor")
    assert "version              3.6.0" in out
    assert "interpreter          on (TRITON_INTERPRET=1)" in out
