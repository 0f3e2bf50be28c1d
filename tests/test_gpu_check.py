"""`make gpu-check` as far as it goes without a GPU: what it records, what it fails on, and that it goes on."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(gpu_check, tmp_path, monkeypatch):
    made = gpu_check.Check(tmp_path, time.monotonic() + 60, {"gpu": "NVIDIA H200", "capability": "9.0"}, rehearse=True)
    made.work = tmp_path
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return made


def run(*arguments):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without one")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "sees no GPU; nothing was checked" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_failed_step_is_recorded_and_the_next_one_begins(tmp_path):
    # Memory checking has no rehearsal: the step fails.
    done = run("--rehearse", "--out", tmp_path, "--steps", "memcheck,small,large")
    assert done.returncode == 1, done.stdout + done.stderr
    (record,) = tmp_path.glob("gpu_check_*.json")
    found = json.loads(record.read_text())
    assert [step["passed"] for step in found["steps"]] == [False, True, True]
    assert "cases, 0 wrong" in found["steps"][1]["summary"]
    for key in ("torch", "cuda", "python", "driver", "nvcc", "commit", "dirty", "date"):
        assert key in found["machine"]
    text = record.with_suffix(".md").read_text()
    assert "| memcheck | FAILED |" in text
    assert "| small | ok |" in text


def test_an_unknown_step_is_refused():
    done = run("--rehearse", "--steps", "small,smell")
    assert done.returncode == 2
    assert "there is no step smell; there are build, tests" in done.stderr


def test_a_step_that_takes_too_long_is_stopped_with_all_it_started(check, tmp_path):
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    began = time.monotonic()
    outcome = check.simple("slow", 0.5, [sys.executable, "-c", script, child])
    assert not outcome.passed
    assert outcome.summary.startswith("stopped after")
    time.sleep(max(0, 4 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()


def test_nothing_begins_after_the_deadline(check):
    check.deadline = time.monotonic() - 1
    assert check.run("late", 10, [sys.executable, "-c", "print(1)"]) == (None, "no time was left")


SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_here(): pytest.skip("needs av")
def test_elsewhere(): pytest.skip("{reason}")
"""


def test_a_skip_for_want_of_a_gpu_fails(gpu_check, check, tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE.replace("assert 1 == 2", "pass").replace("{reason}", "needs a GPU"))
    outcome = gpu_check.run_tests(check, "tests", 50, [str(suite)], processes=1)
    assert not outcome.passed
    assert outcome.summary == "2 passed, 0 failed, 2 skipped; 1 skipped for want of a GPU"
    assert {"1 skipped: needs av", "1 skipped: needs a GPU"} <= set(outcome.details)
    suite.write_text("def test_good(): pass")
    assert gpu_check.run_tests(check, "tests", 50, [str(suite)], processes=1).passed


def test_which_skips_are_for_want_of_a_gpu(gpu_check):
    for reason in ("needs a GPU", "needs Triton", "no CUDA here", "could not import 'triton': No module"):
        assert gpu_check.wants_a_gpu(reason)
    for reason in ("needs av", "needs a second GPU", "needs 30 GB on the GPU", "needs more memory than this GPU has"):
        assert not gpu_check.wants_a_gpu(reason)


def test_tests_that_take_too_long_tell_what_has_run(gpu_check, check, tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)")
    outcome = gpu_check.run_tests(check, "tests", 8, [str(suite)], processes=1)
    assert not outcome.passed
    assert re.fullmatch(r"1 passed in .*; stopped after \d+ s", outcome.summary)
    assert outcome.seconds < 8 + gpu_check.FAREWELL


def test_a_failure_is_named(gpu_check, check, tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    outcome = gpu_check.run_tests(check, "tests", 50, [str(suite)], processes=1)
    assert not outcome.passed
    assert "1 passed, 1 failed, 2 skipped" in outcome.summary
    assert any("test_suite::test_bad: assert 1 == 2" in line for line in outcome.details)


def test_tests_that_cannot_be_collected_fail(gpu_check, check, tmp_path):
    outcome = gpu_check.run_tests(check, "tests", 50, [str(tmp_path / "test_nothing.py")], processes=1)
    assert not outcome.passed


@pytest.mark.parametrize("op", ["edlstm_gates", "codeword_search", "masked_attention3d"])
def test_every_benchmark_is_among_the_steps(gpu_check, op):
    assert op in gpu_check.STEPS
    assert (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").is_file()


def test_the_recorded_models_are_among_the_steps(gpu_check):
    assert "graphs" in gpu_check.STEPS
