"""``vpfast report``: what trained models predict, as one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast._files import new_file
from vpfast._version import __version__
from vpfast.cli._measure import (
    Measured,
    add_measuring_options,
    add_protocol_options,
    errors,
    evaluated,
    frame_errors,
    held_out,
    measured,
    read_first,
)
from vpfast.cli._options import Options
from vpfast.cli._out import check_out_file
from vpfast.data.moving_digits import SPLITS
from vpfast.metrics.video_metrics import HEADINGS
from vpfast.training.evaluation import Evaluation, shown
from vpfast.training.recipes import BASELINE, counted
from vpfast.visual import Clip, Curves, Page, Table, write_page

DESCRIPTION = (
    "Write one HTML page of what a trained model makes of the test split of the data it was trained on, or of other "
    "data by --data.*: a table of errors, their curves frame by frame, and clips that play, each prediction beside "
    "what really happened and its error. --beside.NAME FOLDER shows other weights on the same clips. The page holds "
    "all that it shows and loads nothing, so that it can be sent and opened anywhere."
)


def run(argv: Sequence[str]) -> int:
    """Measure, then write the page; returns 0. Nothing is written where something fails."""
    model, trained = read_first(argv)
    options = Options("vpfast report", DESCRIPTION)
    add_measuring_options(options, model, trained)
    add_protocol_options(options)
    options.add("out", str | None, None, "the HTML file to write")
    options.add("title", str, "Video prediction", "the page's heading")
    options.add("show", int, 4, "how many clips play in the page, evenly spread over those measured")
    options.add("fps", float, 6.0, "frames a second at which they play")
    options.add_flag("force", "replace the page of an earlier run")
    values = options.parse(argv)
    out = _out(values)
    subject = measured(values, model)
    clips = held_out(values, subject.config)
    evaluation = evaluated(subject, clips, values)
    page = Page(
        title=values["title"],
        lead=_lead(subject, len(clips), values["split"], evaluation.reports[evaluation.judged].protocol),  # type: ignore[arg-type]
        tables=_tables(subject, evaluation),
        curves=Curves(frame_errors(evaluation), first=_first(subject), quiet={BASELINE}),
        clips=_clips(subject.titled(evaluation), subject, clips, values),
        context=subject.config.context if subject.recipe.predicts else 0,
        fps=values["fps"],
        facts=_facts(values),
    )
    with new_file(out, replace=values["force"]) as draft:
        write_page(draft, page)
    print(f"{page.lead}\n{out.stat().st_size / 1e6:.2f} MB: {out}")
    return 0


def _out(values: Mapping[str, Any]) -> Path:
    """Where the page goes; ValueError where an option of its own cannot be."""
    if not values["out"] or Path(values["out"]).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: {values['out'] or 'nothing'} given, must be a file that ends in .html")
    if values["show"] < 0:
        raise ValueError(f"show: {values['show']} given, must be at least 0")
    if not 0 < values["fps"] <= 50:
        raise ValueError(f"fps: {values['fps']} given, must be above 0 and at most 50")
    check_out_file(Path(values["out"]), values["force"])
    return Path(values["out"])


def _lead(subject: Measured, clips: int, split: str, protocol: str) -> str:
    """What was measured, in a sentence."""
    config, data = subject.config, subject.config.data
    source = "moving digits" if data.kind == "moving-digits" else Path(data.root or "").name
    task = f"{counted(config.horizon, 'frame')} predicted from {config.context}"
    if not subject.recipe.predicts:
        task = f"{counted(config.context, 'frame')} each, coded and made again"
    return f"{counted(clips, 'clip')} of {source}, {split} split: {task}. Protocol {protocol}."


def _first(subject: Measured) -> int:
    """The number of the first frame that is measured."""
    return subject.config.context + 1 if subject.recipe.predicts else 1


def _tables(subject: Measured, evaluation: Evaluation) -> list[Table]:
    """Means by model, the use of codebooks beside them; and how well codes are foretold, where they are."""
    names = list(evaluation.reports[evaluation.judged].mean)
    columns = [HEADINGS[name] for name in names]
    rows: dict[str, list[str | float]] = {
        title: [report.mean[name] for name in names] for title, report in evaluation.reports.items()
    }
    best = {(row, column) for column, name in enumerate(names) for row in _best(name, evaluation)}
    if evaluation.codes:
        columns += ["codewords used", "perplexity"]
        for title, cells in rows.items():
            use = evaluation.codes.get(title)
            cells += [f"{use.used} of {use.codewords}", f"{use.perplexity:.1f}"] if use else ["", ""]
    columns.append("parameters")
    for title, cells in rows.items():
        model = subject.titled(evaluation).get(title)
        cells.append(f"{sum(each.numel() for each in model.parameters()):,}" if model else "")
    return [Table("Means over all clips and frames; the best in bold", columns, rows, best), *_foretold(evaluation)]


def _best(name: str, evaluation: Evaluation) -> list[int]:
    """The rows of the table that have the best mean of a metric; none where there is nothing to choose from."""
    means = [report.mean[name] for report in evaluation.reports.values()]
    best = max(means) if "↑" in HEADINGS[name] else min(means)
    return [row for row, mean in enumerate(means) if mean == best] if len(means) > 1 else []


def _foretold(evaluation: Evaluation) -> list[Table]:
    rows = {
        f"{title}, {name.replace('_', ' ')}": [f"{value:.4f}" for value in values]
        for title, scores in evaluation.scores.items()
        for name, values in scores.items()
    }
    if not rows:
        return []
    layers = max(map(len, rows.values()))
    filled = {name: cells + [""] * (layers - len(cells)) for name, cells in rows.items()}
    columns = [f"layer {layer}" for layer in range(1, layers + 1)]
    return [Table("How well each layer of codes is foretold from the real ones before it", columns, filled)]


def _clips(
    models: Mapping[str, nn.Module], subject: Measured, clips: Dataset[Tensor], values: Mapping[str, Any]
) -> list[Clip]:
    """Some of the clips, evenly spread: not chosen by how well they are predicted."""
    count = len(clips)  # type: ignore[arg-type]
    found = []
    for index in torch.linspace(0, count - 1, min(values["show"], count)).round().long().tolist():
        truth, given = clips[index], (subject.config.context, values["device"], subject.sampling)
        made = {title: shown(model, truth, *given) for title, model in models.items()}
        notes = {title: f"PSNR {errors(clip, truth[-len(clip) :])['psnr']:.1f} dB" for title, clip in made.items()}
        found.append(Clip(f"Clip {index + 1} of {count}", truth, made, notes))
    return found


def _facts(values: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for, in the words of the command line."""
    facts = {"vpfast": __version__, "torch": torch.__version__}
    own = ("out", "force", "title", "beside", "data")
    facts |= {key: str(value) for key, value in values.items() if key not in own and value is not None}
    facts |= {f"beside.{name}": str(folder) for name, folder in values["beside"].items()}
    data = {key: value for key, value in values["data"].items() if value is not None and key not in SPLITS}
    data[f"{values['split']}.include"] = ", ".join(values["data"][values["split"]]["include"])
    return facts | {f"data.{key}": str(value) for key, value in data.items()}
