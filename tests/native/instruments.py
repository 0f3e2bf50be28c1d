"""The compiled kernels under AddressSanitizer with UndefinedBehaviorSanitizer, or under ThreadSanitizer.

``python tests/native/instruments.py address|thread [PYTEST ARGUMENTS]`` builds an extension with the instrument in it
under ``build/``, beside the usual one, and runs the tests named, or the whole ladder of the kernels, in it. It ends
with 1 where a test fails or the instrument has something to say.

The interpreter and torch are as always; what is compiled of ours is instrumented (csrc/instruments/). Leaks are not
looked for here: CPython and torch keep much to the end; tests/test_long_streams.py measures memory instead.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The tests of a kernel, and of what a kernel is only part of.
LADDER = (
    "tests/ops/test_edlstm_gates.py",
    "tests/ops/test_codeword_search.py",
    "tests/ops/test_codeword_search_near_ties.py",
    "tests/ops/test_codeword_search_refusals.py",
    "tests/ops/test_codeword_search_train.py",
    "tests/ops/test_masked_attention3d.py",
    "tests/ops/test_masked_attention3d_tiles.py",
    "tests/ops/test_plane_convolution.py",
    "tests/ops/test_winograd_convolution.py",
    "tests/ops/test_rounding.py",
    "tests/models/test_compiled_sampler.py",
    "tests/models/test_mspn_tiles.py",
    "tests/models/test_fused_encoder.py",
)


@dataclass(frozen=True)
class Instrument:
    name: str
    runtime: str  # the library that has to be there before all others
    variables: dict[str, str]
    selection: str  # of the ladder, for pytest's -k

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "instruments" / self.name

    def environment(self, reports: Path) -> dict[str, str]:
        """For a Python that imports the instrumented package; a report goes to a file ``reports``.PID."""
        # Python itself brings no C++ library; exceptions that kernels throw need the real one, loaded early.
        preload = " ".join(library(name) for name in (self.runtime, "libstdc++.so.6"))
        said = {name: f"{options}:log_path={reports}" for name, options in self.variables.items()}
        # torch is to wake no threads of its own where a test does not ask for them.
        ours = {"LD_PRELOAD": preload, "PYTHONPATH": str(self.folder / "lib"), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **said, **ours}


INSTRUMENTS = {
    "address": Instrument(
        "address",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:use_sigaltstack=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        # Not those that measure memory, which is the instrument's here; not those that compile, whose compiler knows
        # nothing of it; not one of the last bits, for which the compiler must fuse products.
        "not memory_beyond and not compile and not export and not keep_relative_accuracy",
    ),
    "thread": Instrument(
        "thread",
        "libtsan.so",
        # Of what is not instrumented only threads, locks and memory that comes and goes are followed.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        # Others are too small for more than one thread.
        "threads",
    ),
}


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def library(name: str) -> str:
    """The path of a library of the compiler's; the name alone where it has none."""
    command = [*compiler().split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def why_not(instrument: Instrument) -> str | None:
    """What is missing on this machine, if anything."""
    if shutil.which(compiler().split()[0]) is None:
        return f"no compiler {compiler()}"
    if not os.path.isabs(library(instrument.runtime)):
        return f"{compiler()} has no {instrument.runtime}"
    return None


def build(instrument: Instrument) -> None:
    """Into ``instrument.folder``; quick where nothing has changed."""
    folder = instrument.folder
    command = [
        sys.executable,
        "setup.py",
        "build",
        "--build-lib",
        str(folder / "lib"),
        "--build-temp",
        str(folder / "o"),
    ]
    environment = {**os.environ, "VPFAST_BUILD": "cpu", "VPFAST_INSTRUMENT": instrument.name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the build failed:\n{done.stdout}\n{done.stderr}")


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    reports: str


def run(instrument: Instrument, arguments: list[str], show: bool = False) -> Outcome:
    """``python ARGUMENTS`` beside the instrumented package, and what the instrument said in it and its children."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=instrument.folder / "lib",
            env=instrument.environment(Path(folder) / "report"),
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.STDOUT,
            text=True,
        )
        reports = "\n".join(path.read_text(errors="replace") for path in sorted(Path(folder).iterdir()))
    return Outcome(done.returncode, done.stdout or "", reports)


def pytest(instrument: Instrument, arguments: list[str], show: bool = False) -> Outcome:
    """Tests of this checkout, by paths from its root, on the instrumented package."""
    located = [str(ROOT / each) if each.startswith("tests/") else each for each in arguments]
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # What UndefinedBehaviorSanitizer says goes to stderr, and with it the process.
    return run(instrument, ["-m", "pytest", *options, "--capture=sys", *located], show)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instrument", choices=INSTRUMENTS)
    chosen, arguments = parser.parse_known_args()
    instrument = INSTRUMENTS[chosen.instrument]
    missing = why_not(instrument)
    if missing:
        print(f"cannot run: {missing}", file=sys.stderr)
        return 1
    build(instrument)
    outcome = pytest(instrument, arguments or ["-q", "-k", instrument.selection, *LADDER], show=True)
    print(outcome.reports, file=sys.stderr)
    return 1 if outcome.code or outcome.reports else 0


if __name__ == "__main__":
    sys.exit(main())
