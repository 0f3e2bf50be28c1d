"""What is measured, what is refused, and what the record says of it."""

import json

import pytest
import torch

from vpfast.benchmarks import gpu, growth, harness, measure, record
from vpfast.benchmarks.problem import OWN, Bar, Case, Place, Problem, WrongResultError, hold

SMALL = Place(small=True)


def quiet(title):
    pass


def test_a_row_tells_what_its_contender_does(made):
    rows = {row["contender"]: row for row in made["rows"] if "growth" not in row}
    own, eager, copy = rows[OWN], rows["eager"], rows["copy"]
    assert own["p20_ms"] <= own["p50_ms"] <= own["p80_ms"] <= own["p99_ms"]
    assert own["bytes"] == 8000
    assert own["gb_s"] == pytest.approx(8000 / own["p50_ms"] / 1e6)
    assert own["copy_share"] == pytest.approx(own["gb_s"] / copy["gb_s"])
    product = rows["matrix product, float32"]
    assert own["tflop_s"] == pytest.approx(1000 / own["p50_ms"] / 1e9)
    assert own["matmul_share"] == pytest.approx(own["tflop_s"] / product["tflop_s"])
    assert eager["ratio"] == pytest.approx(eager["p50_ms"] / own["p50_ms"])
    assert own["ratio"] == 1
    assert "ratio" not in copy
    assert "ratio" not in product
    assert own["peak_bytes"] >= 0


def test_a_peer_that_is_not_installed_is_named(made):
    row = next(row for row in made["rows"] if row["contender"] == "faiss")
    assert row["absent"] == "not installed: pip install it"
    assert "p50_ms" not in row
    assert "| faiss | not run: not installed: pip install it |" in record.page(made)


@pytest.mark.parametrize("wrong", [OWN, "eager"])
def test_a_wrong_result_leaves_no_figures(benchmark_of, wrong):
    with pytest.raises(WrongResultError, match=rf"^1000 numbers: {wrong} is wrong \(largest difference 1\.0e\+00"):
        measure.of_benchmark(benchmark_of(wrong), SMALL, 0.001, tell=quiet)


def test_what_is_not_a_number_is_wrong():
    with pytest.raises(WrongResultError, match="nan"):
        hold("eager", "relative error", float("nan"), 1e-6)


def test_a_peer_that_does_not_run_is_told_and_vpfast_has_to():
    def broken():
        raise RuntimeError("no such\n  kernel")

    def problem(name):
        calls = {OWN: lambda: (torch.ones(1),), "eager": lambda: (torch.ones(1),)}
        return Problem({**calls, name: broken}, lambda name, found: None)

    rows, _ = measure.of_case(Case("x", lambda place: problem("eager")), SMALL, 0.001)
    assert rows[-1] == {"case": "x", "contender": "eager", "absent": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError):
        measure.of_case(Case("x", lambda place: problem(OWN)), SMALL, 0.001)


def test_cases_are_chosen_by_what_their_titles_contain(benchmark_of):
    rows, *_ = measure.of_benchmark(benchmark_of(), SMALL, 0.001, ["growth"], tell=quiet)
    assert {row["size"] for row in rows} == {64, 128, 256}
    with pytest.raises(
        ValueError, match="--case nothing: edlstm_gates has no such case; there are: 1000 numbers; growth"
    ):
        measure.of_benchmark(benchmark_of(), SMALL, 0.001, ["nothing"], tell=quiet)
    rows, *_ = measure.of_benchmark(benchmark_of(), SMALL, 0.001, growth=False, tell=quiet)
    assert {row["case"] for row in rows} == {"1000 numbers"}


def test_a_record_is_read_as_it_was_written(made, tmp_path):
    path = record.write(made, tmp_path)
    assert path.name == "edlstm_gates_cpu.json"
    assert record.read(path) == json.loads(json.dumps(made))
    page = path.with_suffix(".md").read_text()
    for part in ("# edlstm_gates", "A rehearsal", "## 1000 numbers", "## Growth over numbers: doubling", "| slope |"):
        assert part in page


def test_slopes_of_powers():
    sizes = [3, 10, 40, 200]
    slope, error, intercept = growth.fit(sizes, [0.5 * size**1.75 for size in sizes])
    assert slope == pytest.approx(1.75)
    assert error == pytest.approx(0, abs=1e-9)
    assert intercept == pytest.approx(-0.6931, abs=1e-3)
    # By hand: logs 0, 1, 2 of size and 0, 1, 1 of value have slope 1/2, a residual of 1/6 and spread 2.
    slope, error, _ = growth.fit([1, 10, 100], [1, 10, 10])
    assert slope == pytest.approx(0.5)
    assert error == pytest.approx((1 / 6 / 1 / 2) ** 0.5)


@pytest.mark.parametrize(("sizes", "values"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 0, 1]), ([2, 2, 2], [1, 1, 1])])
def test_slopes_need_points(sizes, values):
    with pytest.raises(ValueError, match="three positive points"):
        growth.fit(sizes, values)


def test_slopes_stand_in_the_record(made):
    found = {(fit["contender"], fit["of"]): fit for fit in made["slopes"]}
    rows = [row for row in made["rows"] if row.get("growth") and row["contender"] == OWN]
    slope, _, _ = growth.fit([row["size"] for row in rows], [row["p50_ms"] for row in rows])
    assert found[OWN, "time"]["slope"] == slope
    assert found[OWN, "time"]["points"] == 3


def test_memory_that_a_call_holds_is_seen():
    def call():
        held = torch.ones(2**22)  # 16 MB
        return (held[:1].clone(),)

    peak = harness.peak_memory(call)
    if peak is None:
        pytest.skip("the system does not tell what a process held at most")
    assert 15e6 < peak < 40e6


def test_slow_calls_come_once_a_round(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", -1.0)
    monkeypatch.setattr(harness, "BURST_SECONDS", 0.0)
    calls = []
    timings = harness.time_side_by_side({OWN: lambda: calls.append(1)}, 0.0)
    assert timings[OWN].calls == harness.ROUNDS
    assert len(calls) == harness.ROUNDS + 1  # and the warm-up
    harness.time_side_by_side({OWN: lambda: calls.append(1)}, 0.0, slow={OWN})
    assert len(calls) == 2 * harness.ROUNDS + 1


def test_percentiles_stay_within_what_was_measured():
    timing = harness.timing_of([1.0, 2.0, 10.0], [3.0])
    assert (timing.p50_ms, timing.first_ms, timing.calls) == (2.0, 3.0, 3)
    assert 1.0 <= timing.p20_ms <= timing.p80_ms <= timing.p99_ms <= 10.0


def test_the_way_of_a_gpu_is_rehearsed(benchmark_of):
    rows, *_ = measure.of_benchmark(benchmark_of(), Place("cpu", gpu=True, small=True), 0.001, ["1000"], tell=quiet)
    assert {"copy", "matrix product, float32", OWN, "eager"} <= {row["contender"] for row in rows}
    assert all(row["in_a_row_ms"] > 0 for row in rows if "absent" not in row)
    assert gpu.copying(8, "cpu")()[0].numel() == 1


def test_bars_say_whether_they_are_met():
    assert str(Bar("speed", 2.0, 1.5)) == "bar: speed: 2.00x, wanted at least 1.5x: met"
    assert str(Bar("time", 2.0, 1.5, " ms", at_most=True)).endswith("wanted at most 1.5 ms: not met")
    assert str(Bar("speed", None, 1.5)).endswith("not measured, not met")


def test_what_is_timed_for_what_follows_from_it_has_no_rates():
    def prepare(place):
        calls = {OWN: lambda: (torch.ones(1),), "a part": lambda: (torch.ones(1),)}
        helpers = frozenset({"a part"})
        return Problem(calls, lambda name, found: None, moved=8, flops=1, helpers=helpers)

    rows, _ = measure.of_case(Case("x", prepare), SMALL, 0.001)
    part = next(row for row in rows if row["contender"] == "a part")
    assert part["helper"]
    assert not {"gb_s", "tflop_s", "ratio", "copy_share"} & set(part)


def test_a_copy_is_no_larger_than_tells_its_rate(monkeypatch):
    monkeypatch.setattr(measure, "MOST_COPIED", 800)

    def prepare(place):
        return Problem({OWN: lambda: (torch.ones(1),)}, lambda name, found: None, moved=10**15)

    rows, _ = measure.of_case(Case("x", prepare), SMALL, 0.001)
    copy, own = rows
    assert (copy["bytes"], own["bytes"]) == (800, 10**15)
    assert own["copy_share"] == pytest.approx(own["gb_s"] / copy["gb_s"])


def test_a_slope_above_that_of_theory_is_told(benchmark_of, monkeypatch):
    monkeypatch.setattr(measure, "slopes", lambda rows: [{"contender": OWN, "of": "time", "slope": 1.3}])
    _, bars, _ = measure.of_benchmark(benchmark_of(), Place(), 0.001, ["growth"], tell=quiet)
    assert [str(bar) for bar in bars] == [
        "bar: growth over numbers: doubling, slope of time: 1.30, wanted at most 1.1: not met"
    ]
