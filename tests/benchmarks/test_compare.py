"""Two records: what changed beyond noise, and what cannot be compared."""

import copy
import json

import pytest

from vpfast.benchmarks.compare import compare, told
from vpfast.benchmarks.problem import OWN
from vpfast.cli import main


def timed(contender, p20, p50, p80, **others):
    return {"case": "a", "contender": contender, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, **others}


@pytest.fixture
def before(made):
    rows = [
        timed(OWN, 9.0, 10.0, 11.0, peak_bytes=10_000_000),
        timed("eager", 20.0, 21.0, 22.0),
        timed("copy", 1, 1, 1),
    ]
    return {**made, "rows": rows, "slopes": []}


def changed(before, contender, **values):
    after = copy.deepcopy(before)
    next(row for row in after["rows"] if row["contender"] == contender).update(values)
    return after


def test_ranges_that_meet_are_noise(before):
    after = changed(before, OWN, p20_ms=10.9, p50_ms=12.0, p80_ms=13.0)
    assert compare(before, after).changes == []
    assert not compare(before, after).worse


@pytest.mark.parametrize(("p50", "worse"), [(12.0, True), (8.0, False)])
def test_ranges_apart_are_a_change(before, p50, worse):
    found = compare(before, changed(before, OWN, p20_ms=p50 - 0.5, p50_ms=p50, p80_ms=p50 + 0.5))
    (change,) = found.changes
    assert (change.contender, change.what, change.before, change.after) == (OWN, "ms", 10.0, p50)
    assert change.times == p50 / 10
    assert found.worse == worse


def test_a_slower_peer_is_told_and_is_no_fault(before):
    after = changed(before, "eager", p20_ms=30.0, p50_ms=31.0, p80_ms=32.0)
    found = compare(before, after)
    assert len(found.changes) == 1
    assert not found.worse
    assert "| a | eager | ms | 21.0 | 31.0 | 1.48x |" in told(before, after, found)


@pytest.mark.parametrize(("peak", "changes"), [(10_900_000, 0), (12_000_000, 1), (1_000_000, 1)])
def test_memory_counts_from_a_megabyte_and_a_twentieth_on(before, peak, changes):
    found = compare(before, changed(before, OWN, peak_bytes=peak))
    assert len(found.changes) == changes
    assert found.worse == (peak == 12_000_000)


def test_another_machine_is_told(before):
    after = changed(before, "copy", p20_ms=2.0, p50_ms=2.0, p80_ms=2.0)
    after["machine"] = {**after["machine"], "cpu": "another", "commit": "def"}
    after["rows"].append(timed("new", 1.0, 1.0, 1.0))
    page = told(before, after, compare(before, after))
    assert "abc and def" in page
    assert "another cpu: none, then another" in page
    assert "the machine was not the same, or not as quiet" in page
    assert "in the second record alone (1): a: new" in page


def write(folder, name, made):
    path = folder / name
    path.write_text(json.dumps(made))
    return str(path)


def test_the_exit_status_tells_of_vpfast_alone(before, tmp_path, capsys):
    old = write(tmp_path, "a.json", before)
    slower = changed(before, OWN, p20_ms=12.0, p50_ms=13.0, p80_ms=14.0)
    assert main(["bench", "--compare", old, old]) == 0
    assert "0 changes beyond noise" in capsys.readouterr().out
    assert main(["bench", "--compare", old, write(tmp_path, "b.json", slower)]) == 1
    assert "| a | vpfast | ms | 10.0 | 13.0 | 1.30x |" in capsys.readouterr().out
    assert main(["bench", "--compare", write(tmp_path, "b.json", slower), old]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("\xff", "not readable as JSON"),
        ("[]", "not a record of `vpfast bench`"),
        ('{"machine": {}, "rows": []}', "in format 1 (found none)"),
        ('{"format": 1, "name": "x"}', "not a whole record: device is missing"),
        ('{"format": 1, "name": "x", "device": "cpu", "machine": {}, "slopes": [], "rows": [{}]}', "row 0 has no case"),
        (
            '{"format": 1, "name": "x", "device": "cpu", "machine": {}, "slopes": [], '
            '"rows": [{"case": "a", "contender": "b", "p50_ms": "fast"}]}',
            "p50_ms of row 0 is 'fast'",
        ),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(before, tmp_path, capsys, text, said):
    good, bad = write(tmp_path, "a.json", before), tmp_path / "bad.json"
    bad.write_text(text, encoding="latin-1")
    assert main(["bench", "--compare", good, str(bad)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"vpfast: {bad}: ")
    assert said in err
    assert err.count("\n") == 1


def test_comparing_goes_alone(before, tmp_path, capsys):
    path = write(tmp_path, "a.json", before)
    assert main(["bench", "mspn", "--plot", "--compare", path, path]) == 2
    assert "--compare A.json B.json goes alone, got mspn, --plot too" in capsys.readouterr().err


def test_a_missing_record_is_refused(before, tmp_path, capsys):
    assert main(["bench", "--compare", write(tmp_path, "a.json", before), str(tmp_path / "none.json")]) == 2
    assert "none.json: no such file; a record is a JSON file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "sampler"}, "not of one benchmark: edlstm_gates and sampler"),
        ({"device": "cuda"}, "not of one device: cpu and cuda"),
        ({"rehearsed": False}, "not of one rehearsal: True and False"),
        ({"rows": [timed("another", 1, 1, 1)]}, "no timing of one case and contender in common"),
    ],
)
def test_records_of_two_things_are_refused(before, tmp_path, capsys, change, said):
    files = write(tmp_path, "a.json", before), write(tmp_path, "b.json", {**before, **change})
    assert main(["bench", "--compare", *files]) == 2
    assert said in capsys.readouterr().err
