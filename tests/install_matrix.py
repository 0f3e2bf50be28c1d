"""Does what is built install and run, whatever the torch, the Python and the place?

    python tests/install_matrix.py [PYTHON ...]           or: make install-matrix PYTHONS="..."

Each PYTHON is an interpreter, best one with a torch of its own. For each version of Python among them one wheel is
built, by the first of its interpreters that has a torch; every interpreter then gets it, in a new environment that has
that interpreter's packages and whose path has spaces in it, by pip and without a network. There operators and models
go forward and backward (``installed.py``), once more with site-packages that cannot be written, and ``vpfast doctor``
answers. Where there is no torch, a wheel without kernels is built and importing it has to say what is missing.
VPFAST_BUILD is what it is for any build; it is ``cpu`` where it is not set. The exit status is 1 where a line fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(__file__).with_name("installed.py")
WITHOUT_TORCH = "vpfast needs torch 2.11 or later, and none is installed"

Done = subprocess.CompletedProcess[str]


# --- what is built ----------------------------------------------------------------------------------------------------


def copy_of_checkout(target: Path) -> Path:
    """What a build needs, free of what earlier builds left."""
    target.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target)
    for name in ("vpfast", "csrc", "kernels", "benchmarks"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def build_wheel(python: str | Path, tree: Path, out: Path, **variables: str) -> Done:
    """``pip wheel`` without a network; the wheel lies in ``out`` where the status is 0."""
    pip = [python, "-m", "pip", "--isolated", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation"]
    return run([*pip, "-w", out, tree], **{"VPFAST_BUILD": "cpu", "MAX_JOBS": "2", **variables})


def old_torch(folder: Path) -> Path:
    """A folder that holds a torch of the release before the first that will do, as far as anyone asks for it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text('__version__ = "2.10.1+cpu"\n')
    return folder


def wheel_in(folder: Path) -> Path:
    (found,) = folder.glob("*.whl")
    return found


def run(command: Sequence[str | Path], folder: Path | None = None, **variables: str) -> Done:
    """By an interpreter that sees nothing but its own packages, and a pip that nobody told where to look."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_CONFIG_FILE": os.devnull, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


# --- where it goes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interpreter:
    """``torch``: its version; None where there is none."""

    path: Path
    python: str
    torch: str | None
    packages: Path

    @property
    def tag(self) -> str:
        major, minor, *_ = self.python.split(".")
        return f"cp{major}{minor}"

    def __str__(self) -> str:
        return f"Python {self.python}, {'no torch' if self.torch is None else f'torch {self.torch}'}"


def asked(path: Path) -> Interpreter:
    """What an interpreter says about itself."""
    code = (
        "import importlib.metadata as m, json, platform, sysconfig\n"
        "found = [d.version for d in m.distributions() if d.metadata['Name'] == 'torch']\n"
        "print(json.dumps([platform.python_version(), (found or [None])[0], sysconfig.get_path('purelib')]))"
    )
    python, torch, packages = json.loads(run([path, "-c", code], Path("/")).stdout)
    return Interpreter(path, python, torch, Path(packages))


OURS = ("vpfast", "__editable__", "pip", "_distutils_hack", "distutils-precedence")
"""What a new environment does not get of an interpreter's packages: an older vpfast, and what belongs to the place."""


def environment(folder: Path, like: Interpreter, torch: bool = True) -> Path:
    """A new virtual environment with the packages of ``like``, linked, with or without torch; its interpreter."""
    made = run([like.path, "-m", "venv", "--without-pip", folder])
    if made.returncode != 0:
        raise RuntimeError(made.stderr)
    python = folder / "bin" / "python"
    packages = asked(python).packages
    for path in sorted(like.packages.iterdir()):
        left_out = path.name.startswith(OURS) or (not torch and path.name.startswith(("torch", "functorch")))
        if not left_out:
            (packages / path.name).symlink_to(path)
    return python


def install(like: Interpreter, python: Path, wheel: Path, *options: str) -> Done:
    """By pip, which finds what vpfast needs in place, or fails: it may fetch nothing."""
    pip = [like.path, "-m", "pip", "--isolated", "--python", python]
    return run([*pip, "install", "--no-index", "--no-compile", *options, wheel])


def runs(python: Path, backend: str, folder: Path) -> Done:
    """``installed.py`` in an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return run([python, INSTALLED, backend], folder)


# The kernel lets root write everywhere, by a capability that a process can drop for what it executes.
UNPRIVILEGED = (
    "import ctypes, os, sys\n"
    "PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1\n"
    "if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):\n"
    "    sys.exit(os.strerror(ctypes.get_errno()))\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


def runs_read_only(python: Path, backend: str, folder: Path) -> Done:
    """The same where nothing of the package can be written, nor a file be made beside it or where it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = asked(python).packages
    modes = {path: path.stat().st_mode for path in [folder, packages, packages / "vpfast"]}
    modes |= {path: path.stat().st_mode for path in (packages / "vpfast").rglob("*")}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        return run([sys.executable, "-c", UNPRIVILEGED, python, INSTALLED, backend], folder)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


# --- the lines of the matrix ------------------------------------------------------------------------------------------


class FailedError(Exception):
    """What was tried, and what came of it."""


def demand(fine: object, what: str, done: Done) -> None:
    if not fine:
        raise FailedError(f"{what}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def succeeded(what: str, done: Done) -> str:
    demand(done.returncode == 0, what, done)
    return done.stdout


def told(what: str, done: Done) -> dict[str, Any]:
    """The line of JSON."""
    found: dict[str, Any] = json.loads(succeeded(what, done).splitlines()[-1])
    return found


def with_torch(like: Interpreter, wheel: Path, folder: Path) -> str:
    """Install and run it; what is told of it."""
    python = environment(folder / "an environment", like)
    succeeded("pip install", install(like, python, wheel))
    backend = "native" if built(wheel) != "none" else "reference"
    done = runs(python, backend, folder / "an empty folder")
    found = told("forward and backward", done)
    demand(Path(found["package"]).is_relative_to(folder), "another vpfast", done)
    demand((found["extension"] is None) == (backend == "reference"), "the wrong kernels", done)
    done = runs_read_only(python, backend, folder / "another")
    demand(not told("read-only site-packages", done)["writable"], "they can be written", done)
    done = run([python.parent / "vpfast", "doctor"], folder)
    demand(f"on cpu               {backend}" in succeeded("vpfast doctor", done), "vpfast doctor says else", done)
    return f"{found['built']} kernels of {wheel.name}: forward, backward, read-only, doctor"


def without_torch(like: Interpreter, wheel: Path, folder: Path) -> str:
    """It says what is missing; and every file is one of this Python's."""
    python = environment(folder / "an environment", like, torch=False)
    succeeded("pip install", install(like, python, wheel, "--no-deps"))
    done = run([python, "-c", "import vpfast"], folder)
    demand(done.returncode == 1 and WITHOUT_TORCH in done.stderr.splitlines()[-1], "import without torch", done)
    package = asked(python).packages / "vpfast"
    succeeded("compiling all files", run([python, "-W", "error", "-m", "compileall", "-q", package]))
    return f"{wheel.name}: says what is missing; all files compile"


def built(wheel: Path) -> str:
    """Which kernels are in it."""
    done = run(["unzip", "-p", wheel, "vpfast/_build.json"])
    record: dict[str, str] = json.loads(succeeded(f"reading {wheel}", done))
    return record["built"]


def lines(
    interpreters: Sequence[Interpreter], wheels: Sequence[Path], scratch: Path
) -> Iterator[tuple[str, str | None, str]]:
    """(interpreter, what is fine or None, what is wrong)"""
    tree = copy_of_checkout(scratch / "a checkout")
    known = {tag_of(wheel): wheel for wheel in wheels}
    for number, like in enumerate(sorted(interpreters, key=lambda each: each.torch is None)):
        folder = scratch / f"number {number}"
        try:
            if like.tag not in known:
                succeeded(f"building with {like}", build_wheel(like.path, tree, folder / "wheel", **choice(like)))
                known[like.tag] = wheel_in(folder / "wheel")
            work = without_torch if like.torch is None else with_torch
            yield str(like), work(like, known[like.tag], folder), ""
        except (FailedError, subprocess.TimeoutExpired) as error:
            yield str(like), None, str(error)


def tag_of(wheel: Path) -> str:
    """Of its Python, such as cp311."""
    return wheel.name.split("-")[2]


def choice(like: Interpreter) -> dict[str, str]:
    return {"VPFAST_BUILD": "none" if like.torch is None else os.environ.get("VPFAST_BUILD", "cpu")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="*", type=Path, help="interpreters (default: the one that runs this)")
    parser.add_argument("--wheel", action="append", default=[], type=Path, help="for its Python; none is built for it")
    options = parser.parse_args(arguments)
    interpreters = [asked(each) for each in options.python or [Path(sys.executable)]]
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, fine, failure in lines(interpreters, options.wheel, Path(scratch)):
            print(f"{'ok    ' if fine else 'FAILED'}  {name}: {fine or failure}", flush=True)
            wrong += not fine
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
