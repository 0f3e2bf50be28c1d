"""All that is to be seen of vpfast on a GPU, in ten minutes and without a network: `make gpu-check`.

    python benchmarks/gpu_check.py [--out FOLDER] [--steps build,tests,...] [--minutes 10]

Builds for the GPU at hand in a virtual environment of its own that sees this interpreter's packages, then runs the
tests, the cases of gpu_cases.py (also under compute-sanitizer) and the benchmarks. A step that fails, or takes longer
than it may, is recorded, and the next one begins. Leaves gpu_check_<gpu>.json and .md beside the benchmarks' records.
Exit status: 0, 1 where a step failed, 2 where there is no GPU.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES_KEPT = 60  # of what a step that failed said last
FAREWELL = 15  # seconds for a step that is stopped to say what it has

LOOK_AT_GPU = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30)}
    found |= {"gpus": torch.cuda.device_count()}
    try:
        import triton
        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
print(json.dumps(found))
"""


@dataclass
class Outcome:
    """What became of one step."""

    step: str
    passed: bool
    seconds: float
    summary: str
    details: list[str] = field(default_factory=list)


class Check:
    """Runs the steps one after another against one deadline."""

    def __init__(self, out: Path, deadline: float, machine: dict[str, object], rehearse: bool) -> None:
        self.out, self.deadline, self.machine, self.rehearse = out, deadline, machine, rehearse
        self.work = ROOT / "build" / "gpu-check"
        self.python = sys.executable if rehearse else str(self.work / "venv" / "bin" / "python")
        self.environment = {**os.environ, "VPFAST_BACKEND": "auto", "PYTHONUNBUFFERED": "1"}
        self.outcomes: list[Outcome] = []

    def run(self, step: str, budget: float, command: list[str], **variables: str) -> tuple[int | None, str]:
        """Exit status, None for a step that was stopped, and all it said."""
        log = self.work / f"{step}.log"
        seconds = min(budget, self.deadline - time.monotonic())
        if seconds <= 0:
            return None, "no time was left"
        with log.open("w") as said:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **variables},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest then reports what has run
                with suppress(subprocess.TimeoutExpired):
                    process.wait(FAREWELL)
                with suppress(ProcessLookupError):  # whatever it started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        return status, log.read_text(errors="replace")

    def simple(self, step: str, budget: float, command: list[str], **variables: str) -> Outcome:
        """A step that its exit status and last line tell all about."""
        began = time.monotonic()
        status, said = self.run(step, budget, command, **variables)
        lines = said.strip().splitlines() or ["it said nothing"]
        took = time.monotonic() - began
        if status == 0:
            return Outcome(step, True, took, lines[-1][:200])
        how = f"stopped after {took:.0f} s" if status is None else f"exit status {status}"
        return Outcome(step, False, took, f"{how}: {lines[-1][:200]}", lines[-LINES_KEPT:])


# --- steps ------------------------------------------------------------------------------------------------------------


def build(check: Check) -> Outcome:
    """An editable install for this GPU alone, into an environment that sees this interpreter's packages."""
    venv = check.work / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "parent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
    major, minor = str(check.machine["capability"]).split(".")
    architecture = "9.0a" if (major, minor) == ("9", "0") else f"{major}.{minor}"
    install = ["-m", "pip", "install", "-v", "--no-deps", "--no-index", "--no-build-isolation", "--editable", "."]
    outcome = check.simple(
        "build", 200, [check.python, *install], VPFAST_BUILD="cuda", TORCH_CUDA_ARCH_LIST=architecture
    )
    if outcome.passed:
        status, said = check.run("doctor", 60, [check.python, "-m", "vpfast", "doctor"])
        outcome.summary, outcome.details = f"for {architecture}", said.splitlines()
        if status != 0 or "kernel probe         ok" not in said:
            outcome.passed, outcome.summary = False, f"built for {architecture}, but no kernel runs: see doctor"
    return outcome


def tests_for_the_gpu(check: Check) -> Outcome:
    files = [*ROOT.glob("tests/ops/test_*_gpu.py"), *ROOT.glob("tests/models/test_on_gpu.py")]
    return run_tests(check, "tests", 200, sorted(map(str, files)), processes=8)


def other_tests(check: Check) -> Outcome:
    """What else of the ladder can run: the operators, modules and models where no GPU is asked for."""
    folders = ["tests/ops", "tests/nn", "tests/models", "tests/test_stream.py"]
    return run_tests(check, "other-tests", 150, [*folders, "--ignore-glob=*_gpu.py"], processes=os.cpu_count() or 1)


def run_tests(check: Check, step: str, budget: float, what: list[str], processes: int) -> Outcome:
    began, report = time.monotonic(), check.work / f"{step}.xml"
    report.unlink(missing_ok=True)
    probe = subprocess.run([check.python, "-c", "import xdist"], capture_output=True, env=check.environment)
    parallel = ["-n", str(processes), "--dist", "loadgroup"] if probe.returncode == 0 else []
    command = [check.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *parallel, *what]
    status, said = check.run(step, budget, command, OMP_NUM_THREADS="2")
    took, last = time.monotonic() - began, said.strip().splitlines()[-LINES_KEPT:]
    if not report.is_file():
        how = "stopped" if status is None else f"exit status {status}"
        return Outcome(step, False, took, f"{how} after {took:.0f} s without a report", last)
    counts, skips, failures = read_junit(report)
    wanting = [reason for reason in skips if wants_a_gpu(reason)]
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    if status is None:  # the report counts a test that was stopped as passed
        counted = f"{last[-1] if last else 'it said nothing'}; stopped after {took:.0f} s"
    if wanting:
        counted += f"; {sum(skips[reason] for reason in wanting)} skipped for want of a GPU"
    details = [*failures, *(f"{count} skipped: {reason}" for reason, count in skips.most_common())]
    passed = status == 0 and counts["passed"] > 0 and not wanting
    return Outcome(step, passed, took, counted, details if passed else [*details, *last])


def read_junit(report: Path) -> tuple[dict[str, int], Counter[str], list[str]]:
    """How many passed, failed and were skipped; how often for which reason; what failed, and how."""
    counts, skips, failures = {"passed": 0, "failed": 0, "skipped": 0}, Counter[str](), []
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if wrong is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}: {(wrong.get('message') or '')[:400]}")
        elif skip is not None:
            counts["skipped"] += 1
            skips[skip.get("message") or "no reason"] += 1
        else:
            counts["passed"] += 1
    return counts, skips, failures


def wants_a_gpu(reason: str) -> bool:
    """Is this a test that should have run here? A second GPU, and memory, this machine may lack."""
    named = re.search(r"\b(GPU|CUDA|Triton)\b", reason, re.IGNORECASE)
    return bool(named) and not re.search("second|memory|GiB|GB", reason)


def cases(what: str, budget: float) -> Callable[[Check], Outcome]:
    def step(check: Check) -> Outcome:
        rehearsed = ["--device", "cpu", "--elements", "100000"] if check.rehearse else []
        return check.simple(what, budget, [check.python, "benchmarks/gpu_cases.py", what, *rehearsed])

    return step


def sanitizer(tool: str, budget: float) -> Callable[[Check], Outcome]:
    def step(check: Check) -> Outcome:
        if check.rehearse:
            return Outcome(tool, False, 0.0, "there is nothing to rehearse: it needs a GPU")
        homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
        places = [f"{home}/{folder}/compute-sanitizer" for home in homes for folder in ("bin", "compute-sanitizer")]
        program = next(filter(None, map(shutil.which, ["compute-sanitizer", *places])), None)
        if program is None:
            return Outcome(tool, False, 0.0, "compute-sanitizer was not found (PATH, CUDA_HOME)")
        command = [program, "--tool", tool, "--error-exitcode", "3", "--target-processes", "application-only"]
        # Each tensor its own allocation: else what lies beyond one is another's memory, and no error.
        return check.simple(
            tool,
            budget,
            [*command, check.python, "benchmarks/gpu_cases.py", "small"],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )

    return step


def benchmark(op: str, budget: float) -> Callable[[Check], Outcome]:
    def step(check: Check) -> Outcome:
        command = [
            check.python,
            "-m",
            "vpfast",
            "bench",
            op,
            "--device",
            "cuda",
            "--no-growth",
            "--out",
            str(check.out),
        ]
        outcome = check.simple(op, budget, [*command, *(["--rehearse"] if check.rehearse else [])])
        if outcome.passed:  # a bar that is not met is told, not failed on
            said = (check.work / f"{op}.log").read_text(errors="replace")
            outcome.details = [line for line in said.splitlines() if line.startswith("bar: ")]
            missed = sum("not met" in line for line in outcome.details)
            outcome.summary = f"{len(outcome.details) - missed} bars met, {missed} not"
        return outcome

    return step


STEPS: dict[str, Callable[[Check], Outcome]] = {
    "build": build,
    "tests": tests_for_the_gpu,
    "small": cases("small", 60),
    "repeatable": cases("repeatable", 45),
    "large": cases("large", 45),
    "edlstm_gates": benchmark("edlstm_gates", 60),
    "codeword_search": benchmark("codeword_search", 60),
    "masked_attention3d": benchmark("masked_attention3d", 150),
    "graphs": benchmark("graphs", 120),
    "memcheck": sanitizer("memcheck", 75),
    "racecheck": sanitizer("racecheck", 75),
    "other-tests": other_tests,
}
"""In the order of what matters, should time run out."""


# --- the record -------------------------------------------------------------------------------------------------------


def look_at_machine() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", LOOK_AT_GPU], capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout) if done.returncode == 0 else {"torch": None}
    found |= {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    found["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["nvcc"] = first_line("nvcc", "--version", last=True)
    found["commit"] = first_line("git", "rev-parse", "HEAD")
    status = first_line("git", "status", "--porcelain", "--untracked-files=no")
    found["dirty"] = None if found["commit"] is None else status is not None
    found["date"] = time.strftime("%Y-%m-%d %H:%M")
    return found


def first_line(*command: str, last: bool = False) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1 if last else 0].strip() if done.returncode == 0 and lines else None


def markdown(machine: dict[str, object], outcomes: list[Outcome]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = [
        f"# Checked on {machine.get('gpu')}",
        "",
        f"{told}.",
        "",
        "| step | | seconds | |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        summary = outcome.summary.replace("|", "\\|")
        lines.append(f"| {outcome.step} | {'ok' if outcome.passed else 'FAILED'} | {outcome.seconds:.0f} | {summary} |")
    for outcome in outcomes:
        if outcome.details:
            lines += ["", f"## {outcome.step}", "", "```", *outcome.details, "```"]
    return "\n".join(lines) + "\n"


def write(check: Check) -> None:
    """After every step, so that a check that is ended leaves what it saw."""
    name = "gpu_check_" + re.sub(r"[^a-z0-9]+", "-", str(check.machine.get("gpu")).lower()).strip("-")
    record = {"machine": check.machine, "steps": [asdict(outcome) for outcome in check.outcomes]}
    (check.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (check.out / f"{name}.md").write_text(markdown(check.machine, check.outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the records")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of: " + ", ".join(STEPS))
    parser.add_argument("--minutes", type=float, default=9.7, help="for everything; what is left over is not begun")
    parser.add_argument("--rehearse", action="store_true", help="go through the steps on a CPU, small, with no build")
    arguments = parser.parse_args()
    unknown = set(arguments.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")

    deadline = time.monotonic() + 60 * arguments.minutes
    machine = look_at_machine()
    if "gpu" not in machine and not arguments.rehearse:
        print(f"gpu-check: torch {machine['torch']} at {sys.executable} sees no GPU; nothing was checked")
        return 2
    check = Check(arguments.out.resolve(), deadline, machine, arguments.rehearse)
    for folder in (check.out, check.work):
        folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.steps.split(","):
        try:
            outcome = STEPS[name](check)
        except Exception as error:  # a fault of the check itself is one step's failure
            outcome = Outcome(name, False, 0.0, f"{type(error).__name__}: {error}")
        check.outcomes.append(outcome)
        mark = "ok    " if outcome.passed else "FAILED"
        print(f"{mark} {name:<20} {outcome.seconds:4.0f} s  {outcome.summary}", flush=True)
        write(check)
    return 0 if all(outcome.passed for outcome in check.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
