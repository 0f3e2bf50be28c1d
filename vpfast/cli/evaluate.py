"""``vpfast evaluate``: the errors of a trained model on held-out clips, beside what to hold it to."""

import json
from collections.abc import Sequence
from pathlib import Path

from vpfast._files import write_file
from vpfast.cli._measure import add_measuring_options, held_out, measured, read_first
from vpfast.cli._options import Options
from vpfast.cli._out import check_out_file
from vpfast.training.evaluation import evaluate, shown, together
from vpfast.training.recipes import MODEL
from vpfast.visual import write_strip

DESCRIPTION = (
    "Measure a trained model on the test split of the data it was trained on, or of other data by --data.*: MSE, MAE, "
    "PSNR and SSIM under vpfast's default protocol. Of a model that predicts per frame and mean, beside repeating the "
    "last real frame; of one that codes frames for each number of layers, and how much of the codebooks is used. "
    "--beside.NAME FOLDER measures other weights on the same clips. Prints markdown; --out writes JSON, --strip a PNG."
)


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns 0."""
    model, trained = read_first(argv)
    options = Options("vpfast evaluate", DESCRIPTION)
    add_measuring_options(options, model, trained)
    options.add("out", str | None, None, "a JSON file to write the numbers to")
    options.add("strip", str | None, None, "a PNG of one clip to write: what really happened, and what is predicted")
    options.add("strip_clip", int, 0, "which clip the strip shows, from 0")
    values = options.parse(argv)
    if values["strip_clip"] < 0:
        raise ValueError(f"strip_clip: {values['strip_clip']} given, must be at least 0")
    for key in ("out", "strip"):
        if values[key]:
            check_out_file(Path(values[key]), force=True, option=key)
    if values["strip"] and Path(values["strip"]).suffix.lower() != ".png":
        raise ValueError(f"--strip {values['strip']}: must end in .png")
    subject = measured(values, model)
    recipe, config = subject.recipe, subject.config
    clips = held_out(values, config)
    if values["strip_clip"] >= len(clips):  # type: ignore[arg-type]
        raise ValueError(f"strip_clip: {values['strip_clip']} given, must be below the {len(clips)} clips measured")  # type: ignore[arg-type]
    given = (config.context, config.batch_size, True, values["device"])
    evaluations = {
        name: evaluate(each, clips, *given, sampling=subject.sampling) for name, each in subject.models.items()
    }
    evaluation = together(evaluations) if len(evaluations) > 1 else evaluations[MODEL]
    asked = {key: values[key] for key in ("weights", "split", "context", "horizon", "seed")}
    asked["clips"] = len(clips)  # type: ignore[arg-type]
    task = "{horizon} frames from {context}" if recipe.predicts else "{context} frames each, coded and made again"
    print(f"{{clips}} clips of the {{split}} split, {task}, protocol default\n".format(**asked))
    print(evaluation.markdown(per_frame=recipe.predicts))
    if values["out"]:
        write_file(Path(values["out"]), json.dumps({**asked, **evaluation.to_dict()}, indent=2) + "\n")
    if values["strip"]:
        clip = clips[values["strip_clip"]]
        rows = {
            name: shown(each, clip, config.context, values["device"], subject.sampling)
            for name, each in subject.models.items()
        }
        write_strip(values["strip"], {"truth": clip, **rows}, config.context if recipe.predicts else 0)
    return 0
