"""``vpfast evaluate``: the errors of a trained model on held-out clips, beside what to hold it to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vpfast._files import write_file
from vpfast.cli._measure import add_measuring_options, add_protocol_options, evaluated, held_out, measured, read_first
from vpfast.cli._options import Options
from vpfast.cli._out import check_out_file
from vpfast.cli._table import NAMES, check_table, tabulate
from vpfast.training.evaluation import shown
from vpfast.visual import write_strip

DESCRIPTION = (
    "Measure a trained model on the test split of the data it was trained on, or of other data by --data.*: MSE, MAE, "
    "PSNR and SSIM, and with --lpips true LPIPS, by vpfast's own rules or with --protocol by another project's. Of a "
    "model that predicts per frame and mean, beside repeating the last real frame; of one that codes frames for each "
    "number of layers, and how much of the codebooks is used. --beside.NAME FOLDER measures other weights on the same "
    "clips. --table NAME measures what a table of the papers holds, and prints it with the paper's own rows. Prints "
    "markdown; --out writes JSON, --strip a PNG."
)


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns 0."""
    model, trained = read_first(argv)
    options = Options("vpfast evaluate", DESCRIPTION)
    add_measuring_options(options, model, trained)
    add_protocol_options(options)
    options.add("table", str | None, None, f"a table of the papers to fill in: {', '.join(NAMES)}")
    options.add("part", str | None, None, "table: one of its parts, such as kth, where it has several data sets")
    options.add("add", str | None, None, "table: the JSON of an earlier --table; its rows are kept")
    options.add("out", str | None, None, "a file to write the numbers to, as JSON; what is printed if it ends in .md")
    options.add("strip", str | None, None, "a PNG of one clip to write: what really happened, and what is predicted")
    options.add("strip_clip", int, 0, "which clip the strip shows, from 0")
    values = options.parse(argv)
    _check_files(values)
    check_table(values, argv)
    said, numbers = tabulate(values, model) if values["table"] else _measure(values, model)
    print(said)
    if values["out"]:
        plain = Path(values["out"]).suffix.lower() == ".md"
        write_file(Path(values["out"]), f"{said if plain else json.dumps(numbers, indent=2)}\n")
    return 0


def _check_files(values: dict[str, Any]) -> None:
    """Raise an error that names the key where a file cannot be written."""
    if values["strip_clip"] < 0:
        raise ValueError(f"strip_clip: {values['strip_clip']} given, must be at least 0")
    for key in ("out", "strip"):
        if values[key] == "":
            raise ValueError(f"{key}: '' given, must be the name of a file")
        if values[key]:
            check_out_file(Path(values[key]), force=True, option=key)
    if values["strip"] and Path(values["strip"]).suffix.lower() != ".png":
        raise ValueError(f"--strip {values['strip']}: must end in .png")


def _measure(values: dict[str, Any], model: nn.Module | None) -> tuple[str, dict[str, Any]]:
    """The page as markdown, and as plain values; writes the strip."""
    subject = measured(values, model)
    recipe, config = subject.recipe, subject.config
    clips = held_out(values, config)
    if values["strip_clip"] >= len(clips):  # type: ignore[arg-type]
        raise ValueError(f"strip_clip: {values['strip_clip']} given, must be below the {len(clips)} clips measured")  # type: ignore[arg-type]
    evaluation = evaluated(subject, clips, values)
    asked = {key: values[key] for key in ("weights", "split", "context", "horizon", "seed")}
    asked["clips"] = len(clips)  # type: ignore[arg-type]
    task = "{horizon} frames from {context}" if recipe.predicts else "{context} frames each, coded and made again"
    protocol = evaluation.reports[evaluation.judged].protocol
    heading = f"{{clips}} clips of the {{split}} split, {task}, protocol {protocol}".format(**asked)
    if values["strip"]:
        clip = clips[values["strip_clip"]]
        rows = {
            name: shown(each, clip, config.context, values["device"], subject.sampling)
            for name, each in subject.models.items()
        }
        write_strip(values["strip"], {"truth": clip, **rows}, config.context if recipe.predicts else 0)
    said = f"{heading}\n\n{evaluation.markdown(per_frame=recipe.predicts)}"
    return said, {**asked, **evaluation.to_dict()}
