"""``vpfast bench``: what there is, what it refuses, what it leaves."""

import json
import os
import signal
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

from vpfast.benchmarks import plots, record, registry
from vpfast.benchmarks.measure import titles
from vpfast.benchmarks.problem import Benchmark, Case, Place
from vpfast.cli import bench, doctor, main


@pytest.mark.parametrize("name", registry.MODULES)
def test_every_benchmark_has_cases_with_names_of_their_own(name):
    benchmark = registry.load(name)
    assert benchmark.name == name
    for place in (Place(), Place("cpu", gpu=True, small=True)):
        if place.gpu and "cuda" not in benchmark.places:
            continue
        cases = [*benchmark.cases(place), *benchmark.growth(place)]
        found = titles(benchmark, place)
        assert len(found) == len(cases) == len(set(found)) > 0


def test_every_operator_and_model_is_there():
    assert set(doctor.operators()) <= set(registry.MODULES)
    assert {"mspn", "hrvqvae", "sampler", "stream", "loading"} <= set(registry.MODULES)


def test_growth_covers_what_grows():
    over = {
        name: {growth.over for growth in registry.load(name).growth(Place())}
        for name in ("edlstm_gates", "codeword_search", "masked_attention3d", "mspn", "sampler")
    }
    assert over["codeword_search"] == {"vectors N"}
    assert over["masked_attention3d"] == {"positions L"}
    assert over["sampler"] == {"positions sampled"}
    assert over["mspn"] == {"batch", "pixels of a frame", "horizon + 1 frame seen"}
    assert over["edlstm_gates"] == {"batch"}


def refused(capsys, *arguments):
    assert main(["bench", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_served_is_one_line(capsys, tmp_path):
    said = refused(capsys, "edlstm_gate")
    assert "there is no benchmark 'edlstm_gate'; there are edlstm_gates, codeword_search, masked_attention3d" in said
    said = refused(capsys, "stream", "--rehearse", "--case", "MSPM")
    assert "--case MSPM: stream has no such case; there are: a frame, MSPN released-mnist; a frame, " in said
    assert "--seconds 0.0: must be above 0" in refused(capsys, "stream", "--seconds", "0")
    assert "--plot draws beside the records: say with --out FOLDER" in refused(capsys, "stream", "--plot")
    (tmp_path / "file").touch()
    assert "is a file, must be a folder" in refused(capsys, "stream", "--out", tmp_path / "file")
    if not torch.cuda.is_available():
        assert "PyTorch sees no GPU here; --rehearse" in refused(capsys, "stream", "--device", "cuda")


def test_the_list_names_every_benchmark_and_case(capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    for name in registry.MODULES:
        assert f"{name}\n" in out
    for title in (
        "raster, (30, 32, 32), 4 x 32, forward + backward",
        "released-default, 10 -> 10 frames of 64x64, B = 1",
    ):
        assert f"    {title}\n" in out
    assert main(["bench", "--list", "edlstm_gates", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "MSPN level 0, batch 32, 64x64, bfloat16, channels_last, backward" in out


def test_a_run_leaves_record_page_and_pictures(tmp_path, capsys, monkeypatch, benchmark_of):
    monkeypatch.setattr(registry, "load", lambda name: benchmark_of())
    code = main(["bench", "edlstm_gates", "--rehearse", "--seconds", "0.001", "--out", str(tmp_path / "out"), "--plot"])
    assert code == 0
    said = capsys.readouterr()
    assert "## 1000 numbers" in said.out
    assert "... growth over numbers: doubling" in said.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stems = ("", "_roofline", "_growth")
    assert names == {"edlstm_gates_cpu.json", "edlstm_gates_cpu.md", *(f"edlstm_gates_cpu{stem}.png" for stem in stems)}
    found = record.read(tmp_path / "out" / "edlstm_gates_cpu.json")
    assert found["rehearsed"]
    assert found["machine"]["torch"] == torch.__version__
    for stem in stems:
        picture = matplotlib.image.imread(tmp_path / "out" / f"edlstm_gates_cpu{stem}.png")
        assert min(picture.shape[:2]) > 300
        blue = np.abs(picture[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02
        assert blue.sum() > 50  # vpfast's own mark is in it


def test_a_wrong_result_leaves_nothing(tmp_path, capsys, monkeypatch, benchmark_of):
    monkeypatch.setattr(registry, "load", lambda name: benchmark_of("eager"))
    code = main(["bench", "edlstm_gates", "--rehearse", "--seconds", "0.001", "--out", str(tmp_path / "out")])
    assert code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        "vpfast: edlstm_gates: 1000 numbers: eager is wrong (largest difference 1.0e+00, limit 1e-06): no figures"
        in (said.err)
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_measured_before_ctrl_c_is_kept_beside_the_whole_record(tmp_path, capsys, monkeypatch, benchmark_of):
    def stopped(place):
        raise KeyboardInterrupt

    whole, last = benchmark_of(), Case("last", stopped)
    benchmark = Benchmark(whole.name, whole.about, whole.note, lambda place: [*whole.cases(place), last])
    monkeypatch.setattr(registry, "load", lambda name: benchmark)
    arguments = ["bench", "edlstm_gates", "--rehearse", "--seconds", "0.001", "--out", str(tmp_path)]
    assert main(arguments) == 130
    assert "**Stopped before all of it was measured.**" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == {"edlstm_gates_cpu_stopped"}
    found = record.read(tmp_path / "edlstm_gates_cpu_stopped.json")
    assert found["stopped"]
    assert {row["case"] for row in found["rows"]} == {"1000 numbers"}

    assert main([*arguments, "--case", "last"]) == 130  # before anything was measured
    assert capsys.readouterr().out == ""


def test_ctrl_c_in_a_terminal_is_answered_by_the_benchmark_that_runs(tmp_path):
    """Both processes hear it; the one that measures keeps its figures, and no other benchmark begins."""
    command = [sys.executable, "-m", "vpfast", "bench", "stream", "loading", "--rehearse", "--seconds", "0.1"]
    process = subprocess.Popen(
        [*command, "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    told = (line for line in process.stderr if line.startswith("... "))
    assert next(told) != next(told)  # the second case begins
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "**Stopped before all of it was measured.**" in out
    assert {path.stem for path in tmp_path.iterdir()} == {"stream_cpu_stopped"}


def test_a_benchmark_for_the_cpu_alone_says_so(capsys, monkeypatch):
    monkeypatch.setattr(registry, "load", lambda name: Benchmark(name, "", "", lambda place: [], places=("cpu",)))
    assert main(["bench", "loading", "--device", "cuda", "--rehearse"]) == 0
    assert "loading runs on cpu alone: left out" in capsys.readouterr().err


def test_several_run_in_processes_of_their_own(tmp_path, monkeypatch):
    ended = {"edlstm_gates": 0, "sampler": 1, "stream": 0}
    seen = []

    def process(command):
        seen.append(command[1:])
        return ended[command[4]]

    monkeypatch.setattr(bench, "_process", process)
    assert main(["bench", "--seconds", "2", *ended, "--out", str(tmp_path)]) == 1
    assert seen == [["-m", "vpfast", "bench", name, "--seconds", "2", "--out", str(tmp_path)] for name in ended]


def test_one_operator_end_to_end(tmp_path):
    """The real thing, small: what it leaves can be compared with itself."""
    arguments = ["--rehearse", "--seconds", "0.001", "--out", str(tmp_path), "--case", "contiguous, forward"]
    assert main(["bench", "edlstm_gates", *arguments]) == 0
    path = tmp_path / "edlstm_gates_cpu.json"
    found = record.read(path)
    assert {"vpfast", "torch.compile", "eager", "copy"} <= {row["contender"] for row in found["rows"]}
    assert main(["bench", "--compare", str(path), str(path)]) == 0


def test_a_record_without_a_growth_or_bytes_has_bars_alone(made, tmp_path):
    rows = [{"case": "a", "contender": "vpfast", "p50_ms": 3.0}, {"case": "a", "contender": "x", "absent": "why"}]
    written = plots.write_all({**json.loads(json.dumps(made)), "rows": rows, "slopes": []}, tmp_path)
    assert [path.name for path in written] == ["edlstm_gates_cpu.png"]
    assert plots.write_all({**made, "rows": [rows[1]]}, tmp_path) == []
