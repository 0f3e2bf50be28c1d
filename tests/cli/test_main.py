"""The command line as a whole: help, versions, missing extras, and what becomes of errors."""

import os
import signal
import subprocess
import sys

import pytest

import vpfast
from vpfast.cli import COMMANDS
from vpfast.data.sets import SOURCES


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert f"usage: vpfast {name}" in out


@pytest.mark.parametrize("args", [*([name] for name in COMMANDS), *(["data", "prepare", name] for name in SOURCES)])
def test_no_help_speaks_to_a_program(command, args):
    """Neither in the markup of docstrings nor in types of Python."""
    _, out, _ = command(*args, "--help")
    for word in (":func:", ":class:", "``", "Literal", "Optional", "null, default", "tuple[", "dict["):
        assert word not in out


def test_help_tells_the_defaults(command):
    _, out, _ = command("train", "--help")
    said = " ".join(out.split())
    assert "--steps STEPS updates of the weights (int, default: 10000)" in said
    assert "clip the gradient to this norm (float or null)" in said
    assert "wherever that is the faster way; false never does (default: true)" in said
    assert "fewest and most frames fed back (default: [3, 5])" in said
    assert "(default: the digits that come with scikit-learn) --data.size" in said
    assert "--dry-run print the configuration, parameters, memory and FLOPs; read no data, write nothing" in said


def test_an_output_that_nobody_reads_ends_without_a_word():
    """As in ``vpfast bench --list | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vpfast", "bench", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_version(command):
    assert command("--version") == (0, f"vpfast {vpfast.__version__}\n", "")


def test_unknown_commands_are_refused_in_one_line(refused):
    assert "'trian'" in refused("trian")
    assert "COMMAND" in refused()


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train", "accelerate", "cli"),
        ("evaluate", "jsonargparse", "cli"),
        ("predict", "av", "cli"),
        ("encode", "av", "cli"),
    ],
)
def test_a_missing_extra_is_named(command, package, extra, tmp_path, weights, code_weights):
    (tmp_path / "film.avi").write_bytes(b"")
    args = {
        name: [str(tmp_path / "film.avi"), "--weights", str(folder), "--out", str(tmp_path / "o")]
        for name, folder in (("predict", weights), ("encode", code_weights))
    }
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from vpfast.cli import main; sys.exit(main({[command, *args.get(command, [])]!r}))"
    )
    done = run(code)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'vpfast[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_and_help_need_no_extra():
    blocked = ["av", "matplotlib", "tqdm", "jsonargparse", "yaml", "accelerate", "sklearn", "PIL"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from vpfast.cli import main; sys.exit(main(['--help']) + main(['doctor']))"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "edlstm_gates" in done.stdout


def test_python_m_vpfast_is_vpfast():
    done = subprocess.run([sys.executable, "-m", "vpfast", "train", "--stepz", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "vpfast: unknown key '--stepz'; did you mean '--steps'?\n"


@pytest.mark.parametrize("args", [["doctor"], ["train", "--data.size", "32", "--steps", "1"]])
def test_an_unknown_backend_in_the_environment_is_one_line(args, tmp_path):
    out = tmp_path / "run"
    args = [*args, "--out", str(out)] if args[0] == "train" else args
    done = subprocess.run(
        [sys.executable, "-m", "vpfast", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "VPFAST_BACKEND": "fast"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vpfast: VPFAST_BACKEND 'fast' is unknown")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_defects_keep_their_traceback(command, monkeypatch):
    import vpfast.cli.doctor as doctor

    monkeypatch.setattr(doctor, "report", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("doctor")
