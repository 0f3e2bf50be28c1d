"""``vpfast evaluate --table``: a table of one of the papers, what is measured here beside what is printed there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from vpfast.cli._measure import Measured, held_out, measured
from vpfast.models import HRVQVAE, SHRVQVAE
from vpfast.training.checkpoint import read_training
from vpfast.training.config import DataConfig, TrainConfig
from vpfast.training.evaluation import Evaluation, evaluate
from vpfast.training.recipes import BASELINE, MODEL, counted, recipe_of
from vpfast.training.tables import TABLE_1_NAME, TABLES, Entry, Part, Table, compression, page, read_entries

NAMES = tuple(sorted((*TABLES, TABLE_1_NAME)))


def check_table(values: dict[str, Any], argv: Sequence[str]) -> None:
    """Raise an error that names the key where what is asked for cannot be a table; before anything is read."""
    name, part = values["table"], values["part"]
    if name is None:
        for key in ("part", "add"):
            if values[key] is not None:
                raise ValueError(f"{key}: {values[key]} given, must be left out without --table")
        return
    if name not in NAMES:
        raise ValueError(f"table: {name!r} given, must be one of {', '.join(NAMES)}")
    if values["strip"]:
        raise ValueError(f"strip: {values['strip']} given, must be left out beside --table")
    if name == TABLE_1_NAME:
        for key in ("part", "add"):
            if values[key] is not None:
                raise ValueError(f"{key}: {values[key]} given, must be left out: --table {name} has one part")
        return
    if values["add"] is not None and not Path(values["add"]).is_file():
        raise FileNotFoundError(
            f"add: {values['add']} given, must be a file that an earlier --table wrote: there is none"
        )
    parts = _parts(TABLES[name], part)
    for key in ("context", "horizon"):
        if any(arg.partition("=")[0] == f"--{key}" for arg in argv):
            said = " and ".join(f"{each.context} → {each.horizon}" for each in parts)
            raise ValueError(f"{key}: {values[key]} given, must be left out: --table {name} is of {said} frames")


def tabulate(values: dict[str, Any], model: nn.Module | None) -> tuple[str, dict[str, Any]]:
    """The page as markdown, and as plain values.

    Raises:
        ValueError, FileNotFoundError: what cannot be measured so; names the key.
    """
    if values["table"] == TABLE_1_NAME:
        return _compressed(values, model)
    table = TABLES[values["table"]]
    entries = read_entries(Path(values["add"]), table) if values["add"] else []
    protocol = values["protocol"] or table.protocol
    subject: Measured | None = None
    for part in _parts(table, values["part"]):
        if subject is None:
            _check_predicts(table, model)
            subject = measured({**values, "context": part.context, "horizon": part.horizon}, model)
        config = dataclasses.replace(subject.config, context=part.context, horizon=part.horizon)
        subject = subject._replace(config=config)
        entries += _entries(table, part, subject, values, protocol)
    return page.markdown(table, entries, protocol), page.to_dict(table, entries, protocol)


def _parts(table: Table, key: str | None) -> list[Part]:
    """Those to measure: the one that is asked for, or all of a table of one data set."""
    keys = ", ".join(part.key for part in table.parts)
    chosen = [part for part in table.parts if key in (None, part.key)]
    if not chosen:
        raise ValueError(f"part: {key!r} given, must be one of {keys}: the parts of --table {table.name}")
    if len({part.dataset for part in chosen}) > 1:
        sets = ", ".join(f"{part.key} ({part.dataset})" for part in table.parts)
        raise ValueError(
            f"part is missing: --table {table.name} is of several data sets: {sets}. Measure one with --part and --out "
            "FILE, then another with its own weights and data and --add FILE, which keeps the rows of the first"
        )
    return chosen


def _check_predicts(table: Table, model: nn.Module | None) -> None:
    if model is not None and not recipe_of(model).predicts:
        raise ValueError(
            f"--table {table.name} is of predictions, and a {type(model).__name__} predicts nothing; --table "
            f"{TABLE_1_NAME} is of its codes"
        )


def _entries(table: Table, part: Part, subject: Measured, values: dict[str, Any], protocol: str) -> list[Entry]:
    """What each model, and repeating the last frame, makes of a part."""
    config = subject.config
    clips = held_out(values, config)
    said = _clips_in_words(clips, values["split"], config.data)
    given = (config.context, config.batch_size, True, values["device"], subject.sampling, protocol, values["lpips"])
    entries: dict[str, Entry] = {}
    methods = _methods(subject, values)
    for name, model in subject.models.items():
        method, labels = methods[name], _training_labels(table, name, values)
        found = evaluate(model, clips, *given)
        for title, report in found.reports.items():
            of_model = title != BASELINE
            row = _row_name(method, title, found)
            size = sum(each.numel() for each in model.parameters()) if of_model else None
            entries[row] = Entry(row, labels if of_model else ("",) * len(labels), part.key, said, size, report)
    return sorted(entries.values(), key=lambda entry: entry.parameters is None)  # the baseline once, at the end


def _row_name(method: str, title: str, found: Evaluation) -> str:
    return title if title == BASELINE else method if title == found.judged else f"{method}, {title}"


def _methods(subject: Measured, values: dict[str, Any]) -> dict[str, str]:
    """What each model's row is called: as the model was named, or as the folder of its run.

    Raises:
        ValueError: two rows would be called the same.
    """
    folder = Path(values["weights"]).resolve()
    own = folder.parent.name if folder.name == "weights" else folder.name
    methods = {name: f"vpfast: {own if name == MODEL else name}" for name in subject.models}
    if own in values["beside"] and MODEL in subject.models:
        raise ValueError(
            f"beside.{own}: the row of --weights is called {own} too; give one of them another name (--name)"
        )
    return methods


def _training_labels(table: Table, name: str, values: dict[str, Any]) -> tuple[str, ...]:
    """What the table says of the training of a model, beside the data set."""
    if "Adv." not in table.labels:
        return ()
    folder = values["beside"].get(name, values["weights"])
    trained = read_training(Path(folder))
    if trained is None:
        return "not known", "not known"
    said = trained.adversarial.enabled, trained.loss.feedback != "none"
    return tuple("yes" if each else "no" for each in said)


def _clips_in_words(clips: Dataset[Any], split: str, data: DataConfig) -> str:
    height, width = data.frame_size
    source = {"moving-digits": "moving digits", "video-folder": "videos", "prepared": "the prepared set"}[data.kind]
    if data.root is not None:
        source += f" of {data.root}" if data.kind == "moving-digits" else f" {data.root}"
    elif data.kind == "moving-digits":
        source += " of scikit-learn"
    colour = "grey" if data.channels == 1 else "RGB"
    return f"{counted(len(clips), 'clip')} of the {split} split of {source}; frames {height}x{width}, {colour}"  # type: ignore[arg-type]


def _compressed(values: dict[str, Any], model: nn.Module | None) -> tuple[str, dict[str, Any]]:
    """Table 1 of S-HR-VQVAE: the codes of each model, on a disk."""
    horizon = 0 if isinstance(model, HRVQVAE) else max(values["horizon"], 1)
    subject = measured({**values, "horizon": horizon}, model)
    models: dict[str, HRVQVAE] = {}
    methods = _methods(subject, values)
    for name, each in subject.models.items():
        if not isinstance(each, HRVQVAE | SHRVQVAE):
            raise ValueError(f"--table {TABLE_1_NAME} is of codes, and a {type(each).__name__} has none")
        models[methods[name]] = each.autoencoder if isinstance(each, SHRVQVAE) else each
    config: TrainConfig = dataclasses.replace(subject.config, horizon=0)
    clips = held_out(values, config)
    said = _clips_in_words(clips, values["split"], config.data)
    measures: dict[str, compression.Compression] = {}
    for name, each in models.items():
        order = tqdm(range(len(clips)), desc="encode", unit="clip", disable=None, leave=False)  # type: ignore[arg-type]
        measures[name] = compression.compress(each, (clips[index] for index in order), values["device"])
    size = config.data.frame_size
    return compression.markdown(models, measures, size, said), compression.to_dict(models, measures, size, said)
