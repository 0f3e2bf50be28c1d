"""The papers' tables: what is typed in is what is printed, and what is measured comes out where it belongs."""

import json
import math
import re

import pytest
import torch

from vpfast.metrics import PROTOCOLS, Report
from vpfast.models import HRVQVAE, SHRVQVAEConfig
from vpfast.training.tables import TABLES, Entry, compression, page, read_entries
from vpfast.training.tables.measured import measured_rows
from vpfast.training.tables.printed import PROTOCOL_OF, printed_rows
from vpfast.training.tables.shrvqvae import TABLE_1_COLUMNS, TABLE_1_ROWS


def value(text):
    return float(text.removesuffix("M"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_rectangles_of_numbers(name):
    table = TABLES[name]
    assert table.rows
    for row in table.rows:
        assert len(row.labels) == len(table.labels)
        assert len(row.values) == len(table.columns)
        for text in row.values:
            assert text in ("-", "×") or value(text) > 0
        assert row.protocol in (None, *PROTOCOLS)
    for line in table.lines:
        assert len(line.cells) == len(table.columns)
        for cell in line.cells:
            assert cell.part in ("", *(part.key for part in table.parts))
            horizon = next((part.horizon for part in table.parts if part.key == cell.part), 1)
            assert cell.first <= (cell.last or horizon) <= horizon
    assert table.protocol in PROTOCOLS
    assert set(table.slips) <= {(row.labels[0], column) for row in table.rows for column in table.columns}
    assert len({(row.labels) for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("name", TABLES)
def test_every_number_is_in_the_papers_own_table(name, shared):
    """The numbers of a row on a line of the paper, in their order with what is not printed, and the rows in theirs."""
    paper = shared / "papers" / f"{'mspn' if name.startswith('mspn') else 's-hr-vqvae'}.txt"
    if not paper.is_file():
        pytest.skip(f"needs the paper's text, {paper}")
    text = paper.read_text()
    number = name.partition("-")[2]
    heading = {"2": "II", "3": "III", "4": "IV", "5": "V", "7": "VII"}[number] if name.startswith("mspn") else number
    start = re.search(rf"^ ?TABLE {heading}(:|$)", text, re.MULTILINE)
    after = text[start.end() :]
    after = after[: re.search(r"^ ?(TABLE \w+(:|$)|Fig\. \d+[.:]|6\.2 |\* Equiv)", after, re.MULTILINE).start()]
    lines = [line.split() for line in after.splitlines()]
    places = []
    for row in TABLES[name].rows:
        values = list(row.values)
        places.append(next(place for place, line in enumerate(lines) if line[-len(values) :] == values))
    assert places == sorted(set(places))
    count = sum(len(line) > 2 and all(re.fullmatch(r"[\d.]+M?|-|×", each) for each in line[-2:]) for line in lines)
    assert count == len(TABLES[name].rows)  # none is left out


def numbers_of(name, *labels):
    (row,) = [row for row in TABLES[name].rows if row.labels[: len(labels)] == labels]
    return [None if text in ("-", "×") else value(text) for text in row.values]


def test_the_tables_agree_with_each_other_as_their_notes_say():
    assert numbers_of("mspn-7", "MSPN (ours)", "KTH", "yes", "yes") == numbers_of("mspn-2", "MSPN (ours)")[:3]
    halves = numbers_of("mspn-5", "MSPN (Ours)")
    for index, name in enumerate(("Caltech Pedestrian", "KITTI")):
        first, second = halves[6 * index : 6 * index + 3], halves[6 * index + 3 : 6 * index + 6]
        whole = numbers_of("mspn-7", "MSPN (ours)", name, "yes", "yes")
        for a, b, mean in zip(first, second, whole, strict=True):
            assert mean == pytest.approx((a + b) / 2, abs=0.0051)
    disjoint, joint = (numbers_of("shrvqvae-2", f"S-HR-VQVAE-{how} (ours)") for how in ("disjoint", "joint"))
    assert numbers_of("shrvqvae-3", "3-layer S-HR-VQVAE")[:5] == disjoint[:5]
    assert numbers_of("shrvqvae-3", "3-layer S-HR-VQVAE (joint)")[:5] == joint[:5]


def test_the_papers_psnr_is_that_of_a_pixel_sum():
    psnr, _, mse = numbers_of("shrvqvae-3", "3-layer S-HR-VQVAE (joint)")[3:]
    assert 10 * math.log10(255**2 / mse) == pytest.approx(psnr, abs=0.01)
    assert -10 * math.log10(mse / 64**2) == pytest.approx(19.5, abs=0.05)
    for method, true in (("ConvLSTM (2015) [15]", 16.0), ("McNet (2018) [13]", 11.8)):
        psnr, _, mse, _ = numbers_of("shrvqvae-2", method)[3:]
        assert -10 * math.log10(mse / 64**2) == pytest.approx(true, abs=0.05)
        assert (psnr > true + 10) == ((method, "Moving MNIST 10 → 10 PSNR ↑") in TABLES["shrvqvae-2"].slips)


def report(horizon, protocol="mspn", **values):
    values = {"mse_sum": 2.0, "mae_sum": 3.0, "psnr": 20.0, "ssim": 0.5} | values
    per_frame = {name: [each + step for step in range(horizon)] for name, each in values.items()}
    return Report(protocol, 4, {name: sum(each) / horizon for name, each in per_frame.items()}, per_frame)


def entry(part, horizon, method="vpfast: run", labels=(), parameters=1_140_000, protocol="mspn", **values):
    return Entry(method, labels, part, "4 clips", parameters, report(horizon, protocol, **values))


def test_numbers_are_means_of_the_cells_frames():
    (row,) = measured_rows(TABLES["mspn-5"], [entry("kitti", 10, lpips_x100=10.0)])
    assert row.numbers[:6] == (None,) * 6
    assert row.numbers[6:] == pytest.approx((2.5, 22, 12, 7.5, 27, 17))
    found = measured_rows(TABLES["mspn-4"], [entry("human36m", 10, lpips_x100=10.0)])
    assert [each.labels for each in found] == [("vpfast: run", name) for name in ("PSNR ↑", "SSIM ↑", "LPIPS ↓")]
    assert found[0].numbers == pytest.approx((21, 23, 25, 27, 29))
    assert found[2].numbers == pytest.approx((0.11, 0.13, 0.15, 0.17, 0.19))
    (row,) = measured_rows(TABLES["mspn-2"], [entry("20", 20, lpips=0.1), entry("40", 40)])
    assert row.numbers == (10, 29.5, pytest.approx(960), 20, 39.5, None)
    (row,) = measured_rows(TABLES["shrvqvae-2"], [entry("mnist", 10)])
    assert row.numbers == (None, None, None, 24.5, 5, 6.5, 1_140_000)


def test_a_method_on_several_parts_is_one_row_and_the_later_measurement_counts():
    first, second, again = entry("kth", 20), entry("mnist", 10), entry("kth", 20, ssim=0.25)
    (row,) = measured_rows(TABLES["shrvqvae-2"], [first, second, again])
    assert row.numbers[1] == 9.75
    assert None not in row.numbers[3:]
    rows = measured_rows(
        TABLES["mspn-7"], [entry("kth", 20, labels=("no", "yes")), entry("kitti", 10, labels=("no", "no"))]
    )
    assert [row.labels for row in rows] == [
        ("vpfast: run", "KTH", "no", "yes"),
        ("vpfast: run", "KITTI", "no", "no"),
    ]


def test_a_line_that_is_left_out_is_told():
    said = page.markdown(TABLES["mspn-4"], [entry("human36m", 10)], "mspn")
    assert "Not measured here: LPIPS ↓; LPIPS is with `--lpips true`." in said
    said = page.markdown(TABLES["mspn-4"], [entry("human36m", 10, lpips_x100=10.0)], "mspn")
    assert "ot measured here" not in said


@pytest.mark.parametrize("name", TABLES)
def test_the_page_reads_well(name):
    table = TABLES[name]
    more = ("no", "yes") if name == "mspn-7" else ()
    entries = [entry(part.key, part.horizon, labels=more, protocol=table.protocol, lpips=0.1) for part in table.parts]
    said = page.markdown(table, entries, table.protocol)
    lines = said.splitlines()
    tabled = [line for line in lines if line.startswith("|") and not line.startswith(("| Clips", "|---|---|---|---|"))]
    wide = len(table.labels) + len(table.columns) + 2
    assert all(line.count("|") == wide for line in tabled[: 2 + len(table.rows) + len(table.lines)])
    assert lines[0] == f"# {table.caption}"
    assert table.source in lines[2]
    assert len([line for line in tabled if line.startswith("| **vpfast: run**")]) == len(table.lines)
    for row in table.rows:
        values = [
            f"{value} §" if (row.labels[0], column) in table.slips else value
            for column, value in zip(table.columns, row.values, strict=True)
        ]
        (line,) = [
            each
            for each in tabled
            if [*each.split(" | ")[1 : len(row.labels)], *values] == each.split(" | ")[1:-1]
            and each.startswith(f"| {row.labels[0]}")
        ]
        assert ("†" in line) == (row.protocol not in (None, table.protocol))
        assert ("‡" in line) == (row.protocol is None)
    for mark in "†‡§":
        assert (f"\n{mark}: " in said) == any(mark in line for line in tabled)
    for note in table.notes:
        assert f"- {note}" in lines
    for part in table.parts:
        assert f"| {part.dataset} | {part.context} → {part.horizon} | {part.clips} | 4 clips |" in lines


def test_another_protocol_marks_the_papers_own_rows():
    said = page.markdown(TABLES["mspn-3"], [entry("mnist", 10, protocol="default")], "default")
    assert "| MSPN (Ours) † | 0.963 | 12.9 | mspn |" in said
    assert "| **vpfast: run** | **5.000** | **6.5** | default |" in said
    assert "the paper's own" not in said


def test_the_page_as_values_holds_the_same():
    table = TABLES["shrvqvae-2"]
    values = json.loads(json.dumps(page.to_dict(table, [entry("mnist", 10, protocol="predrnn")], "predrnn")))
    assert values["columns"][0] == "Method"
    printed, ours = values["rows"][:-1], values["rows"][-1]
    assert [row["cells"]["Method"] for row in printed] == [row.labels[0] for row in table.rows]
    assert printed[0]["cells"]["KTH 10 → 20 PSNR ↑"] == 23.01
    assert printed[1]["cells"]["KTH 10 → 20 LPIPS ↓"] is None
    assert printed[0]["cells"]["Parameters ↓"] == 16_600_000
    assert [row["comparable"] for row in printed if row["protocol"] == "vptr"] == [False]
    assert printed[0]["comparable"] is None
    assert (ours["from"], ours["comparable"], ours["cells"]["Parameters ↓"]) == ("vpfast", True, 1_140_000)


def test_earlier_rows_are_read_again(tmp_path):
    table = TABLES["mspn-5"]
    entries = [entry("caltech", 10, lpips_x100=3.0)]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(page.to_dict(table, entries, "mspn")))
    assert read_entries(path, table) == entries
    with pytest.raises(ValueError, match="is of the table mspn-5, must be of mspn-2"):
        read_entries(path, TABLES["mspn-2"])
    for text in (
        "",
        "{}",
        "[]",
        '{"table": "mspn-5", "measured": [{}]}',
        '{"table": "mspn-5", "measured": 7}',
        "[" * 99_999,
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="no table that `vpfast evaluate --table` wrote"):
            read_entries(path, table)
    good = page.to_dict(table, entries, "mspn")["measured"][0]
    for wrong in (
        {"method": 1},
        {"labels": ["yes", "no"]},
        {"parameters": "many"},
        {"report": good["report"] | {"per_frame": {"ssim": ["high"]}}},
        {"report": good["report"] | {"per_frame": {"ssim": 1}}},
        {"report": good["report"] | {"mean": None}},
        {"report": good["report"] | {"mean": {"ssim": "high"}}},
        {"part": "nowhere"},
        {"more": 1},
    ):
        path.write_text(json.dumps({"table": "mspn-5", "measured": [good | wrong]}))
        with pytest.raises(ValueError, match="no table that `vpfast evaluate --table` wrote"):
            read_entries(path, table)
    with pytest.raises(FileNotFoundError):
        read_entries(tmp_path / "no.json", table)


def test_a_row_with_labels_missing_is_no_row():
    with pytest.raises(ValueError, match="has 1 labels, must have 2"):
        printed_rows("SimVP [62] | 0.905 33.72", more_labels=1)
    (row,) = printed_rows("SimVP [62] | 0.905 33.72")
    assert (row.protocol, PROTOCOL_OF["SimVP"].protocol) == ("simvp", "simvp")


@pytest.mark.parametrize(("preset", "column"), [("kth-3x8", 1), ("kth-9x2", 2), ("mnist-1x64", 3), ("mnist-3x4", 4)])
def test_compression_is_that_of_two_files(preset, column, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig.preset(preset, channels=(4, 4), residual_channels=4))
    side = 128 if preset.startswith("kth") else 64
    clips = torch.rand(2, 3, model.config.in_channels, side, side)
    found = compression.compress(model, clips, "cpu")
    assert found.frames == 6
    assert found.frame_bytes == clips.numel()
    assert found.code_bytes == len(model.encode(clips.flatten(0, 1)).to_bytes())
    assert not list(tmp_path.iterdir())
    printed = float(TABLE_1_ROWS["Compression"][column][1:])
    assert found.ratio_without_header == pytest.approx(printed, abs=0.01)
    assert printed * 0.9 < found.ratio < found.ratio_without_header
    ours = compression.configuration(model, (side, side))
    assert ours == {label: cells[column] for label, cells in TABLE_1_ROWS.items() if label != "Compression"}
    said = compression.markdown({"vpfast: x": model}, {"vpfast: x": found}, (side, side), "2 clips")
    assert f"| Compression | ≈42.66 | ≈42.66 | ≈42.66 | ≈21.33 | ≈21.33 | ≈21.33 | **{found.ratio:.2f}** |" in said
    assert f"6 frames are {found.frame_bytes:,} bytes with 8 bits a sample, {found.code_bytes:,} as codes: " in said
    values = json.loads(json.dumps(compression.to_dict({"x": model}, {"x": found}, (side, side), "2 clips")))
    assert [each["method"] for each in values["columns"]] == [*TABLE_1_COLUMNS, "x"]
    assert values["measured"]["x"]["code_bytes"] == found.code_bytes


def test_nothing_is_not_compressed():
    model = HRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", channels=(4, 4), residual_channels=4))
    with pytest.raises(ValueError, match="no clip was given"):
        compression.compress(model, [], "cpu")
