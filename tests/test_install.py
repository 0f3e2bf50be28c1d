"""One wheel, built once, in the places where it may go; `make install-matrix` takes it to other torches and Pythons."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import install_matrix
import pytest
from install_matrix import (
    asked,
    build_wheel,
    copy_of_checkout,
    environment,
    install,
    old_torch,
    run,
    runs,
    told,
    wheel_in,
)

HERE = asked(Path(sys.executable))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def build_folder(tree):
    """Where setuptools gathers what goes into a wheel."""
    return tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "vpfast"


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def record_in(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("vpfast/_build.json"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """With what a build of another time may have left."""
    tree = copy_of_checkout(tmp_path_factory.mktemp("source") / "a checkout")
    left = build_folder(tree)
    left.mkdir(parents=True)
    (left / "gone.py").write_text("raise ImportError")
    return tree


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """With compiled kernels, on a machine whose nvcc does not work."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    broken = tmp_path_factory.mktemp("cuda")
    (broken / "bin").mkdir()
    (broken / "bin" / "nvcc").write_text("#!/bin/sh\necho 'unsupported GNU version' >&2; exit 1\n")
    (broken / "bin" / "nvcc").chmod(0o755)
    quick = tmp_path_factory.mktemp("compiler") / "g++"  # half its time; how fast kernels are is not looked at here
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O1\n')
    quick.chmod(0o755)
    out = tmp_path_factory.mktemp("native")
    done = build_wheel(sys.executable, checkout, out, VPFAST_BUILD="auto", CUDA_HOME=str(broken), CXX=str(quick))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vpfast builds: cpu" in done.stdout + done.stderr
    return wheel_in(out)


@pytest.fixture(scope="module")
def plain_wheel(wheel, checkout, tmp_path_factory):
    """Without kernels, of the same checkout, after the other."""
    out = tmp_path_factory.mktemp("plain")
    done = build_wheel(sys.executable, checkout, out, VPFAST_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vpfast builds: none" in done.stdout + done.stderr
    return wheel_in(out)


@pytest.fixture(scope="module")
def bare(plain_wheel, tmp_path_factory):
    """An environment that has vpfast and no torch; pip has to be told to."""
    python = environment(tmp_path_factory.mktemp("bare") / "environment", HERE, torch=False)
    done = install(HERE, python, plain_wheel)
    assert done.returncode == 1
    assert "No matching distribution found for torch>=2.11" in done.stderr
    assert install(HERE, python, plain_wheel, "--no-deps").returncode == 0
    return python


def test_a_broken_nvcc_gives_a_cpu_build(wheel):
    record = record_in(wheel)
    assert record["built"] == "cpu"
    assert "unsupported GNU version" in record["reason"]
    assert f"vpfast/_C{SUFFIX}" in names_in(wheel)


def test_paths_with_spaces_and_site_packages_that_cannot_be_written(wheel, capsys):
    """As `make install-matrix` sees them, in each of its lines."""
    assert install_matrix.main(["--wheel", str(wheel), sys.executable]) == 0
    assert (
        capsys.readouterr().out
        == f"ok      {HERE}: cpu kernels of {wheel.name}: forward, backward, read-only, doctor\n"
    )


def test_the_matrix_fails_where_a_line_does(wheel, monkeypatch, capsys):
    def fails(*arguments):
        install_matrix.demand(False, "forward", subprocess.CompletedProcess([], 1, "", "no such operator"))

    monkeypatch.setattr(install_matrix, "with_torch", fails)
    assert install_matrix.main(["--wheel", str(wheel), sys.executable]) == 1
    assert capsys.readouterr().out == f"FAILED  {HERE}: forward:\nno such operator\n"


def test_one_checkout_builds_what_is_asked_and_nothing_of_before(wheel, plain_wheel):
    assert not [name for name in names_in(plain_wheel) if name.endswith(".so")]
    assert record_in(plain_wheel)["built"] == "none"
    for each in (wheel, plain_wheel):
        assert "vpfast/gone.py" not in names_in(each)
        assert zipfile.ZipFile(each).testzip() is None
    without_kernels = {name for name in names_in(wheel) if not name.endswith(".so")}
    assert set(names_in(plain_wheel)) == without_kernels


def test_builds_of_one_checkout_at_the_same_time_wait_for_each_other(checkout, plain_wheel, tmp_path):
    def once(number):
        return build_wheel(sys.executable, checkout, tmp_path / str(number), VPFAST_BUILD="none")

    with ThreadPoolExecutor(3) as pool:
        for done in pool.map(once, range(3)):
            assert done.returncode == 0, done.stdout + done.stderr
    for number in range(3):
        assert sorted(names_in(wheel_in(tmp_path / str(number)))) == sorted(names_in(plain_wheel))


def test_two_builds_side_by_side(wheel, plain_wheel, tmp_path):
    """Each environment has its own; and what lies first on the path is whole, without the other's kernels."""
    one, other = environment(tmp_path / "one", HERE), environment(tmp_path / "other", HERE)
    assert install(HERE, one, wheel).returncode == 0
    assert install(HERE, other, plain_wheel).returncode == 0
    code = "from vpfast.ops import _native as n; print(n.build_record()['built'], n.extension and n.extension.__file__)"
    extension = asked(one).packages / "vpfast" / f"_C{SUFFIX}"
    before = {"PYTHONPATH": str(asked(other).packages)}
    for python, variables, told_of in (
        (one, {}, f"cpu {extension}"),
        (other, {}, "none None"),
        (one, before, "none None"),
    ):
        done = run([python, "-c", code], tmp_path, **variables)
        assert done.stdout.strip() == told_of, done.stderr


def test_a_build_in_place_without_kernels_leaves_none_of_before(tmp_path):
    tree = copy_of_checkout(tmp_path / "checkout")
    others = tree / "vpfast" / "_C.cpython-39-other.so"
    for path in (tree / "vpfast" / f"_C{SUFFIX}", others):
        path.write_text("of another build")
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, VPFAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert list((tree / "vpfast").glob("_C*.so")) == [others]


def test_an_extension_that_does_not_load_is_told(plain_wheel, tmp_path):
    """The package works without it, and says why to whoever asks for it."""
    python = environment(tmp_path / "environment", HERE)
    assert install(HERE, python, plain_wheel).returncode == 0
    package = asked(python).packages / "vpfast"
    (package / f"_C{SUFFIX}").write_text("no library")
    (package / "_build.json").write_text(json.dumps({"requested": "cpu", "built": "cpu", "reason": "VPFAST_BUILD=cpu"}))
    found = told("forward and backward", runs(python, "reference", tmp_path / "empty"))
    assert (found["built"], found["extension"]) == ("cpu", None)
    done = runs(python, "native", tmp_path / "empty")
    assert done.returncode == 1
    assert f"the compiled extension does not load ({package / f'_C{SUFFIX}'}: " in done.stderr.splitlines()[-1]


MISSING = (
    f"{install_matrix.WITHOUT_TORCH}: pip install torch, or pip install torch --index-url "
    "https://download.pytorch.org/whl/cpu for a build without CUDA"
)


def test_without_torch_the_import_says_what_to_install(bare, tmp_path):
    for code in ("import vpfast", "from vpfast.nn import EDLSTMCell"):
        done = run([bare, "-c", code], tmp_path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {MISSING}"


def test_without_torch_the_command_line_says_so_in_one_line(bare, tmp_path):
    command = bare.with_name("vpfast")
    for words in ([command, "doctor"], [command], [bare, "-m", "vpfast", "--help"], [bare, "-m", "vpfast.cli.demo"]):
        done = run(words, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"vpfast: {MISSING}\n")
    told = run([command, "doctor"], tmp_path, PYTHONPATH=str(old_torch(tmp_path / "old")))
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert told.stderr.startswith("vpfast: vpfast needs torch 2.11 or later, found 2.10.1+cpu: ")
    shown = run([command, "doctor"], tmp_path, VPFAST_TRACEBACK="1")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr


def test_without_torch_another_program_gets_the_error(bare, tmp_path):
    """Also one that is run as a module, or is given the word vpfast."""
    (tmp_path / "other.py").write_text("try:\n    import vpfast\nexcept ModuleNotFoundError:\n    print('caught')\n")
    for words in (["other.py", "vpfast"], ["-m", "other", "-m", "vpfast"]):
        assert run([bare, *words], tmp_path).stdout == "caught\n"


def test_a_torch_that_is_too_old_is_named(bare, tmp_path):
    done = run([bare, "-c", "import vpfast"], tmp_path, PYTHONPATH=str(old_torch(tmp_path / "old")))
    assert done.stderr.splitlines()[-1] == (
        "ImportError: vpfast needs torch 2.11 or later, found 2.10.1+cpu: pip install --upgrade torch"
    )


def test_a_torch_that_is_broken_is_not_called_missing(bare, tmp_path):
    (tmp_path / "torch.py").write_text("import a_part_of_torch")
    done = run([bare, "-c", "import vpfast"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'a_part_of_torch'"
