"""What setup.py decides, what it says, and what ends up in the wheel."""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from install_matrix import ROOT, copy_of_checkout, old_torch

from vpfast.ops import _native


def load_setup():
    spec = importlib.util.spec_from_file_location("vpfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["vpfast_setup"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    return copy_of_checkout(tmp_path / "a path with spaces")


def build(tree, python=sys.executable, arguments=("build", "--build-lib", "out"), **variables):
    environment = {**os.environ, "PYTHONPATH": "", "MAX_JOBS": "2", **variables}
    return subprocess.run([python, "setup.py", *arguments], cwd=tree, env=environment, capture_output=True, text=True)


def record(tree):
    return json.loads((tree / "out" / "vpfast" / "_build.json").read_text())


def script(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_none_builds_pure_python(tree):
    done = build(tree, VPFAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert "vpfast builds: none" in done.stdout
    assert record(tree)["reason"] == "VPFAST_BUILD=none"
    assert not list((tree / "out").rglob("*.so"))
    code = (
        "import torch, vpfast; from vpfast.ops import _native, edlstm_gates;"
        "h, c = edlstm_gates(torch.ones(1, 4, 2, requires_grad=True), torch.ones(1, 1, 2)); h.sum().backward();"
        "print(_native.extension, _native.why_missing(), vpfast.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tree / "out")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "without compiled kernels (VPFAST_BUILD=none)" in done.stdout
    assert str(tree) in done.stdout


def test_unknown_choice_is_refused(tree):
    done = build(tree, VPFAST_BUILD="gpu")
    assert done.returncode != 0
    assert "VPFAST_BUILD='gpu' is unknown; choose one of auto, cpu, cuda, none" in done.stderr


@pytest.mark.parametrize(("instrument", "built"), [("leaks", "cpu"), ("thread", "auto")])
def test_an_instrument_is_for_the_cpu_and_known(tree, instrument, built):
    done = build(tree, VPFAST_BUILD=built, VPFAST_INSTRUMENT=instrument)
    assert done.returncode != 0
    assert f"VPFAST_INSTRUMENT='{instrument}' with VPFAST_BUILD={built}: choose one of address, thread" in done.stderr


def test_without_a_compiler(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    hidden = {"PATH": str(tmp_path / "empty"), "CXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    done = build(tree, VPFAST_BUILD="auto", **hidden)
    assert done.returncode == 0, done.stderr
    assert "vpfast builds: none" in done.stdout
    assert "no C++ compiler was found" in record(tree)["reason"]
    done = build(tree, VPFAST_BUILD="cpu", **hidden)
    assert done.returncode != 0
    assert "VPFAST_BUILD=cpu, but no C++ compiler was found" in done.stderr
    assert "apt install g++" in done.stderr


def test_a_broken_compiler_is_not_taken(tree, tmp_path):
    broken = script(tmp_path / "bin", "g++", "echo 'cannot execute cc1plus' >&2; exit 1\n")
    done = build(tree, VPFAST_BUILD="auto", CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "does not work: cannot execute cc1plus" in record(tree)["reason"]


def test_a_broken_nvcc_is_not_taken(tree, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    script(tmp_path / "cuda" / "bin", "nvcc", "echo 'unsupported GNU version' >&2; exit 1\n")
    done = build(tree, VPFAST_BUILD="cuda", CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode != 0
    assert "VPFAST_BUILD=cuda, but" in done.stderr
    assert "nvcc does not work: unsupported GNU version. Install the CUDA toolkit or set CUDA_HOME" in done.stderr


def test_without_nvcc(monkeypatch):
    """Wherever one may lie on this machine."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    setup, runnable = load_setup(), os.access
    monkeypatch.setattr(setup.os, "access", lambda path, mode: "nvcc" not in str(path) and runnable(path, mode))
    monkeypatch.delenv("VPFAST_BUILD", raising=False)
    decision = setup.decide()
    assert (decision.built, decision.nvcc) == ("cpu", None)
    assert decision.reason == "no nvcc was found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    monkeypatch.setenv("VPFAST_BUILD", "cuda")
    with pytest.raises(SystemExit, match=r"VPFAST_BUILD=cuda, but no nvcc was found .*Install the CUDA toolkit or set"):
        setup.decide()


def test_without_torch_the_message_holds_the_command(tree, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    site = Path(sysconfig.get_path("purelib"))
    for name in ("setuptools", "setuptools-*.dist-info", "pybind11", "ninja", "pkg_resources", "_distutils_hack"):
        for found in site.glob(name):
            (tools / found.name).symlink_to(found)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = build(tree, python, VPFAST_BUILD="cpu", PYTHONPATH=str(tools))
    assert done.returncode != 0
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in done.stderr
    # The metadata and an sdist need no torch.
    done = build(tree, python, arguments=("sdist",), PYTHONPATH=str(tools))
    assert done.returncode == 0, done.stderr


def test_a_torch_that_is_too_old_is_refused(tree, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    done = build(tree, VPFAST_BUILD="cpu", PYTHONPATH=str(old_torch(tmp_path)))
    assert done.returncode != 0
    assert "it needs torch >= 2.11, found 2.10.1+cpu: pip install --upgrade torch" in done.stderr


def test_without_the_tools_of_a_build_the_message_names_them(monkeypatch):
    setup = load_setup()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match="without build isolation it needs pybind11 and ninja: pip install 'pybind11>"):
        setup.extension(setup.Decision("cpu", "cpu", ""))


def test_torch_is_found_where_build_isolation_hides_it(tmp_path, monkeypatch):
    """Isolation takes site-packages off sys.path; the interpreter still knows where it is."""
    setup = load_setup()
    site = str(Path(importlib.util.find_spec("torch").origin).parents[1])
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: site)
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: object() if site in sys.path else None)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != site])
    assert setup.find_torch()[0].isdigit()
    assert site in sys.path


def test_architecture_list():
    setup = load_setup()
    assert setup.gencode_flags("8.0;9.0a;10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    for wrong in ("Hopper", "8.0;sm_90", "+PTX"):
        with pytest.raises(SystemExit, match=r"is not like 8\.0, 9\.0a or"):
            setup.gencode_flags(wrong)


def test_architecture_list_of_the_environment_is_honoured(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a,12.0+PTX")
    assert setup.architectures("no nvcc is asked") == "8.6;9.0a;12.0+PTX"


def test_architectures_that_no_kernel_is_for_are_left_out(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0+PTX 12.0")
    assert setup.architectures("no nvcc is asked") == "8.0;9.0+PTX;12.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(SystemExit, match=r"'7\.0;7\.5\+PTX': kernels need compute capability 8\.0"):
        setup.architectures("no nvcc is asked")


def test_the_extension_holds_the_architectures_it_was_built_for():
    built = _native.build_record()
    if built["built"] != "cuda":
        pytest.skip(f"built without CUDA: {built['reason']}")
    assert _native.extension.build_info()["cuda_architectures"] == built["architectures"]
    cuobjdump = Path(load_setup().toolkit_root(built["nvcc"])) / "bin" / "cuobjdump"
    if not cuobjdump.is_file():
        pytest.skip("needs cuobjdump to look inside")
    elves = subprocess.run([cuobjdump, "--list-elf", _native.extension.__file__], capture_output=True, text=True).stdout
    for entry in built["architectures"].split(";"):
        assert "sm_" + entry.removesuffix("+PTX").replace(".", "") + "." in elves


# All in torch 2.11. TORCH_TARGET_VERSION keeps later functions from a build by a later torch, but no macro and no file.
MACROS = {
    *("STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK"),
    *("AOTI_TORCH_SUCCESS", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK", "TORCH_TARGET_VERSION"),
}
HEADERS = {
    *(
        f"torch/csrc/stable/{name}.h"
        for name in ("accelerator", "library", "ops", "tensor", "stableivalue_conversions")
    ),
    *("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h"),
    *(f"torch/headeronly/core/{name}.h" for name in ("DeviceType", "MemoryFormat", "ScalarType")),
    *(f"torch/headeronly/util/{name}.h" for name in ("BFloat16", "Exception", "Half", "shim_utils")),
}


def test_sources_take_nothing_that_the_oldest_torch_lacks():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert set(re.findall(r"#include <(torch/.*?)>", text)) <= HEADERS, path
        assert set(re.findall(r"\b(?:\w+_)?TORCH_[A-Z_]+\b", text)) <= MACROS, path


def test_no_cpp_symbol_of_torch_is_needed():
    """What is left undefined is the C interface; c10:: or at:: would tie the binary to one torch release."""
    if _native.extension is None or shutil.which("nm") is None:
        pytest.skip("needs the compiled extension and nm")
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", _native.extension.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "aoti_torch_" in undefined
    assert [line for line in undefined.splitlines() if any(n in line for n in ("c10::", "at::", "torch::"))] == []


def test_what_only_a_cuda_torch_has_is_no_symbol():
    """A CUDA build also loads where torch has no CUDA: what is missing there is looked up when it is called."""
    built = _native.build_record()
    if built["built"] != "cuda" or shutil.which("nm") is None:
        pytest.skip(f"needs an extension with CUDA and nm; built {built['built']}: {built['reason']}")
    command = ["nm", "-D", "--undefined-only", _native.extension.__file__]
    undefined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Nor of the runtime, which is within. The number of a kind of device every torch has.
    names = [line.split()[-1] for line in undefined.splitlines() if "cuda" in line]
    assert set(names) <= {"aoti_torch_device_type_cuda"}


def test_sdist_and_wheel(tree):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": "", "VPFAST_BUILD": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "vpfast/py.typed",
        "vpfast/_build.json",
        "vpfast/kernels/__init__.py",
        "vpfast/kernels/_ahead_of_time.py",
        "vpfast/benchmarks/registry.py",
        "vpfast/benchmarks/ops/bench_edlstm_gates.py",
        "vpfast/ops/edlstm_gates/README.md",
        "vpfast/configs/mspn/moving-digits.yaml",
        "vpfast/weights/mspn-one-digit/model.safetensors",
        "vpfast/weights/shrvqvae-one-digit/README.md",
    ):
        assert wanted in names
    package = [name for name in names if ".dist-info/" not in name]
    assert all(name.startswith("vpfast/") for name in package)
    suffixes = {".py", ".md", ".yaml", ".css", ".js", ".json", ".typed", ".safetensors"}
    assert {Path(name).suffix for name in package} <= suffixes
    assert not [name for name in package if "test" in name or "results" in name]
    assert not {f"vpfast/benchmarks/{name}" for name in ("gpu_check.py", "resources.py", "NOTES.md")} & set(names)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    listing = subprocess.run(["tar", "tzf", sdist], capture_output=True, text=True, check=True).stdout
    assert "csrc/edlstm_gates/edlstm_gates_cpu.cpp" in listing
    assert "csrc/common/cuda_probe_cuda.cu" in listing
    assert "benchmarks/models/bench_mspn.py" in listing
    assert "/tests/" not in listing
    assert "/results/" not in listing
