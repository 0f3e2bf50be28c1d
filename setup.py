"""Decides what is compiled; nothing else. The rest of the package's description is in pyproject.toml.

VPFAST_BUILD=auto (the default) compiles CPU and CUDA kernels where a working nvcc is found (no GPU is needed), CPU
kernels where only a C++ compiler is, nothing where neither is. =cpu, =cuda and =none insist. The decision and its
reason are printed (pip shows them with -v) and kept in vpfast/_build.json for `vpfast doctor`.

VPFAST_INSTRUMENT=address (AddressSanitizer and UndefinedBehaviorSanitizer) or =thread (ThreadSanitizer) compiles CPU
kernels that tell of their errors; tests/native/instruments.py builds and runs them.

The extension keeps to LibTorch's stable ABI: one binary serves every torch from 2.11 on, CPU and CUDA builds alike.
"""

import fcntl
import glob
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CHOICES = ("auto", "cpu", "cuda", "none")
# Python's own flags may have signed numbers wrap around, and check some calls in a way that instruments do not see.
_LOOKED_AT = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-U_FORTIFY_SOURCE"]
INSTRUMENTS = {
    # Left out is what would look at every pointer again, and checks are calls: a third of the compiler's time, and
    # AddressSanitizer looks.
    "address": [
        *_LOOKED_AT,
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,alignment,object-size,vptr,pointer-overflow",
        "--param=asan-instrumentation-with-call-threshold=0",
        "-fno-sanitize-recover=all",
    ],
    "thread": [*_LOOKED_AT, "-fsanitize=thread"],
}
INSTRUMENT_SOURCES = {
    "address": ["csrc/instruments/planted.cpp"],
    "thread": ["csrc/instruments/planted.cpp", "csrc/instruments/threads.cpp"],
}
CHECKOUT_ONLY = {("vpfast.benchmarks", "gpu_check"), ("vpfast.benchmarks", "resources")}
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11
# Ampere, Ada, Hopper, Blackwell; and PTX of the last, for what comes after.
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"


@dataclass
class Decision:
    requested: str
    built: str  # "cuda" (CPU and CUDA kernels), "cpu" or "none"
    reason: str
    cxx: str | None = None
    nvcc: str | None = None
    architectures: str = ""
    torch: str | None = None
    instrument: str | None = None


def refuse(message: str) -> None:
    raise SystemExit(f"\nvpfast cannot be built: {message}\n")


def compiles(command: list[str], suffix: str, source: str) -> str | None:
    """None if the compiler makes a small program, else the last line it said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source)
        try:
            done = subprocess.run(
                [*command, str(path), "-o", str(path) + ".out"], capture_output=True, text=True, timeout=120
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def find_cxx() -> tuple[str | None, str]:
    """(compiler, "") or (None, why not)."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if name is None:
        return None, "no C++ compiler was found (CXX, g++, c++, clang++)"
    complaint = compiles(name.split(), ".cpp", "#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
    return (name, "") if complaint is None else (None, f"the C++ compiler {name} does not work: {complaint}")


def find_nvcc() -> tuple[str | None, str]:
    """(path, "") or (None, why not)."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in candidates if path and os.access(path, os.X_OK)), None)
    if nvcc is None:
        return None, "no nvcc was found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    complaint = compiles(
        [nvcc], ".cu", "#include <cuda_runtime.h>\n__global__ void k() {}\nint main() { k<<<1, 1>>>(); }\n"
    )
    return (nvcc, "") if complaint is None else (None, f"{nvcc} does not work: {complaint}")


def toolkit_root(nvcc: str) -> str:
    """Where the toolkit lies: nvcc knows, also when the one on PATH is a link or a script that calls it."""
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((line.split("TOP=", 1)[1].strip() for line in said.splitlines() if "TOP=" in line), None)
    return os.path.realpath(top if top else Path(nvcc).parents[1])


def decide() -> Decision:
    requested = os.environ.get("VPFAST_BUILD", "auto")
    if requested not in CHOICES:
        refuse(f"VPFAST_BUILD={requested!r} is unknown; choose one of {', '.join(CHOICES)}")
    instrument = os.environ.get("VPFAST_INSTRUMENT") or None
    if instrument and (instrument not in INSTRUMENTS or requested != "cpu"):
        refuse(
            f"VPFAST_INSTRUMENT={instrument!r} with VPFAST_BUILD={requested}: choose one of {', '.join(INSTRUMENTS)}, "
            "with VPFAST_BUILD=cpu"
        )
    if requested == "none":
        return Decision(requested, "none", "VPFAST_BUILD=none")

    cxx, no_cxx = find_cxx()
    if cxx is None:
        if requested != "auto":
            refuse(f"VPFAST_BUILD={requested}, but {no_cxx}. Install one (Debian, Ubuntu: apt install g++)")
        return Decision(requested, "none", no_cxx)
    if requested == "cpu":
        return Decision(requested, "cpu", "VPFAST_BUILD=cpu", cxx, instrument=instrument)

    nvcc, no_nvcc = find_nvcc()
    if nvcc is None:
        if requested == "cuda":
            refuse(f"VPFAST_BUILD=cuda, but {no_nvcc}. Install the CUDA toolkit or set CUDA_HOME")
        return Decision(requested, "cpu", no_nvcc, cxx)
    return Decision(requested, "cuda", f"nvcc found at {nvcc}", cxx, nvcc, architectures(nvcc))


def architectures(nvcc: str) -> str:
    """What kernels can be compiled for of TORCH_CUDA_ARCH_LIST, or of the default list, as far as nvcc knows it."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    entries = list(filter(None, asked.split(";")))
    if entries:
        served = [entry for entry in entries if not re.match(r"[1-7]\.", entry)]
        if not served:
            refuse(f"TORCH_CUDA_ARCH_LIST={asked!r}: kernels need compute capability 8.0 or later")
        return ";".join(served)
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    number = {
        arch: "compute_" + arch.split("+")[0].replace(".", "").rstrip("a") for arch in DEFAULT_ARCHITECTURES.split(";")
    }
    known = [arch for arch in number if number[arch] in listing]
    if not known:
        refuse(f"{nvcc} knows none of {DEFAULT_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST to what it knows: {listing}")
    return ";".join(known)


def gencode_flags(architectures: str) -> list[str]:
    """ "9.0a;10.0+PTX" -> one -gencode flag for each machine code, and one for each +PTX."""
    flags = []
    for entry in architectures.split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            refuse(f"TORCH_CUDA_ARCH_LIST={architectures!r}: {entry!r} is not like 8.0, 9.0a or 10.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_torch() -> str:
    """Make torch importable and return its version.

    Build isolation hides the environment that the package goes into; its torch is what the user runs, so that is where
    to look, rather than in a second torch of several GB that pip would download for the build.
    """
    if importlib.util.find_spec("torch") is None:
        for folder in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))):
            if os.path.isdir(os.path.join(folder, "torch")):
                sys.path.append(folder)
    importlib.invalidate_caches()
    if importlib.util.find_spec("torch") is None:
        refuse(
            "it compiles against the torch that you run, and there is none in this environment "
            f"({sys.prefix}). Install one first, then vpfast:\n\n"
            "    pip install torch --index-url https://download.pytorch.org/whl/cpu\n"
            "    pip install .\n\n"
            "(without --index-url pip takes a CUDA build of torch). "
            "VPFAST_BUILD=none builds without compiled kernels and needs no torch"
        )
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        refuse(f"it needs torch >= 2.11, found {torch.__version__}: pip install --upgrade torch")
    return torch.__version__


def extension(decision: Decision) -> Extension:
    """The extension module vpfast._C for this decision; torch must be importable."""
    try:
        import pybind11
    except ImportError:
        refuse(
            "without build isolation it needs pybind11 and ninja: pip install 'pybind11>=2.13' ninja 'setuptools>=77'"
        )
    from torch.utils import cpp_extension

    sources = ["csrc/module.cpp", "csrc/common/isa.cpp", *sorted(glob.glob("csrc/*/*_cpu.cpp"))]
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    settings: dict = {}
    nvcc_flags: list[str] = []
    if decision.nvcc:
        nvcc_flags = ["-O3", *gencode_flags(decision.architectures)]
        cuda_home = toolkit_root(decision.nvcc)
        sources += sorted(glob.glob("csrc/*/*_cuda.cu"))
        macros += [("VPFAST_WITH_CUDA", None), ("VPFAST_CUDA_ARCHITECTURES", f'"{decision.architectures}"')]
        # A CPU build of torch sets CUDA_HOME to None, and its CUDAExtension wants libraries that such a build lacks.
        # The runtime is linked statically, so the module also imports where no CUDA is installed.
        cpp_extension.CUDA_HOME = cuda_home
        # Nothing of torch's CUDA is compiled against or linked: the toolkit need not be of the version that torch has.
        cpp_extension._check_cuda_version = lambda *compiler: None
        settings = {
            "include_dirs": [os.path.join(cuda_home, "include")],
            "library_dirs": [os.path.join(cuda_home, folder) for folder in ("lib64", "lib")],
            "libraries": ["cudart_static", "rt", "dl", "pthread"],
        }
    # pybind11's own headers come first: the copy inside some torch releases refuses TORCH_TARGET_VERSION.
    settings["include_dirs"] = [pybind11.get_include(), os.path.abspath("csrc"), *settings.get("include_dirs", [])]
    optimization = ["-O3", "-g0"]
    if decision.instrument:
        optimization = INSTRUMENTS[decision.instrument]
        sources += INSTRUMENT_SOURCES[decision.instrument]
        macros.append(("VPFAST_INSTRUMENT", f'"{decision.instrument}"'))
        # What is defined here is taken before what torch has under the same name.
        settings["extra_link_args"] = [*optimization, "-Wl,-Bsymbolic-functions"]
    cxx_flags = [
        *optimization,
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-maybe-uninitialized",
    ]
    return cpp_extension.CppExtension(
        "vpfast._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        **settings,
    )


class BuildNative(build_ext):
    """Asks for torch only when something is really compiled: metadata and sdists need none."""

    def run(self) -> None:
        decision = decide()
        if decision.built != "none":
            decision.torch = find_torch()
        print(
            f"\n  vpfast builds: {decision.built}    (VPFAST_BUILD={decision.requested}; {decision.reason})\n",
            flush=True,
        )
        if decision.built != "none":
            self._compile(decision)
        folder = Path("vpfast") if self.inplace else Path(self.build_lib) / "vpfast"
        folder.mkdir(parents=True, exist_ok=True)
        if decision.built == "none":  # what an earlier build left in the checkout would still be loaded
            (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        (folder / "_build.json").write_text(json.dumps(asdict(decision), indent=2) + "\n")

    def _compile(self, decision: Decision) -> None:
        from torch.utils.cpp_extension import BuildExtension

        module = extension(decision)
        os.environ["CXX"] = decision.cxx  # the one that was tried
        self.distribution.ext_modules = [module]
        command = BuildExtension(self.distribution, use_ninja=True)
        for name in ("inplace", "build_lib", "build_temp", "force", "debug", "parallel"):
            setattr(command, name, getattr(self, name))
        command.ensure_finalized()
        command.run()

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, "vpfast", "_build.json")]


class BuildPython(build_py):
    """Leaves out the tools of a checkout, which lie beside the benchmarks, and what an earlier build left."""

    def run(self) -> None:
        folder = Path(self.build_lib) / "vpfast"
        if folder.resolve() != Path("vpfast").resolve():
            shutil.rmtree(folder, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if each[:2] not in CHECKOUT_ONLY]


@contextmanager
def alone() -> Iterator[None]:
    """All builds of a checkout work in its folder build/: a second one waits for the first."""
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    setup(
        packages=[
            *find_namespace_packages(
                include=["vpfast*"], exclude=["*.__pycache__*", "vpfast.benchmarks*", "vpfast.weights.*"]
            ),
            "vpfast.kernels",
            "vpfast.benchmarks",
            *(f"vpfast.benchmarks.{part}" for part in ("ops", "models", "data")),
        ],
        package_dir={"vpfast.kernels": "kernels", "vpfast.benchmarks": "benchmarks"},
        package_data={
            "": ["README.md"],
            "vpfast": ["py.typed"],
            "vpfast.configs": ["**/*.yaml"],
            "vpfast.weights": ["*/*"],
            "vpfast.visual": ["page.css", "page.js"],
        },
        exclude_package_data={"vpfast.benchmarks": ["NOTES.md"]},
        ext_modules=[Extension("vpfast._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )


if __name__ == "__main__":
    with alone():
        main()
