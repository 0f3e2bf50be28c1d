"""What a run tells of itself: a JSON line a step, a progress bar, TensorBoard, and curves when it ends."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import Tensor
from tqdm import tqdm

from vpfast._files import write_file
from vpfast.training.config import TrainConfig
from vpfast.visual import Series, write_curves, write_strip

LINES, CURVES, EVENTS = "log.jsonl", "curves.png", "tensorboard"

_NO_CURVE = frozenset({"step", "seconds", "clips"})
_LINEAR = frozenset({"lr"})


class RunLog:
    """The log of one run, in the folder ``config.out``; in every process but the main one it says and writes nothing.

    Nothing is touched before :meth:`opened`.

    Raises:
        ImportError: ``config.tensorboard`` without that package; says what to install.
    """

    def __init__(self, config: TrainConfig, main: bool, progress: bool) -> None:
        self.config, self.out, self.main, self.progress = config, Path(config.out), main, progress and main
        check_tensorboard(config)
        self._lines: TextIO | None = None
        self._events: Any = None
        self._bar: Any = None

    @contextmanager
    def opened(self, step: int) -> Iterator["RunLog"]:
        """The log of a run that has ``step`` steps behind it; what was logged after that is dropped. When the block
        ends, however it does, the curves are drawn."""
        if not self.main:
            yield self
            return
        cut(self.out / LINES, step)
        total = self.config.steps
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not self.progress, dynamic_ncols=True)
        try:
            with (self.out / LINES).open("a") as self._lines, self._bar:
                self._events = self._event_writer(step)
                yield self
        finally:
            if self._events is not None:
                self._events.close()
            self._draw()

    def write(self, record: Mapping[str, Any]) -> None:
        """What there is to tell of one step: ``step``, ``loss``, ``lr``, ``clips``, ``seconds``, and whatever else."""
        if self._lines is None:
            return
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        if self._events is not None:
            for tag, value in scalars(record).items():
                self._events.add_scalar(tag, value, record["step"])
        self._bar.set_postfix(_postfix(record), refresh=False)
        self._bar.update()

    def wants_strip(self, step: int) -> bool:
        """Whether a strip of this step is shown."""
        return self._events is not None and bool(self.config.strip_every) and step % self.config.strip_every == 0

    def strip(self, step: int, rows: Mapping[str, Tensor], context: int) -> None:
        """Show clips below each other, as :func:`vpfast.visual.write_strip` does."""
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "strip.png"
            write_strip(path, rows, context, dpi=80)
            with Image.open(path) as image:
                self._events.add_image("sample", np.array(image.convert("RGB")), step, dataformats="HWC")

    def _event_writer(self, step: int) -> Any:
        if not self.config.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # What was told of later steps before the run was interrupted is hidden.
        return SummaryWriter(str(self.out / EVENTS), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def _draw(self) -> None:
        """Curves of the whole run. A disk that is full now takes nothing away that is written already."""
        try:
            draw(self.out)
        except OSError as error:
            print(f"vpfast: no curves were drawn: {error}", file=sys.stderr)


def check_tensorboard(config: TrainConfig) -> None:
    """Raise ImportError, which says what to install, where TensorBoard is asked for and not there."""
    if not config.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "tensorboard: true given, but that package is not installed: pip install 'vpfast[tensorboard]'"
        ) from error


def draw(out: Path) -> None:
    """Draw ``out/curves.png`` from ``out/log.jsonl``; nothing where no step is logged."""
    records = [record for _, record in _whole_lines(out / LINES)]
    panels: dict[str, dict[str, Series]] = {}
    for name, line, steps, values in _columns(records):
        panels.setdefault(name, {})[line] = Series(steps, values)
    if panels:
        write_curves(out / CURVES, _ordered(panels), title=f"{out}: {records[-1]['step']} steps", linear=_LINEAR)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by the tags that TensorBoard groups: train/loss, val/psnr/prediction, ..."""
    tags = {"train/clips_per_second": record["clips"] / max(record["seconds"], 1e-9)}
    for key, value in record.items():
        if key in _NO_CURVE:
            continue
        kind, name = ("val", key.removeprefix("val_")) if key.startswith("val_") else ("train", key)
        lines = value.items() if isinstance(value, Mapping) else [("", value)]
        for line, number in lines:
            if number is not None:
                tags[f"{kind}/{name}/{line}".rstrip("/").replace(" ", "_")] = number
    return tags


def _columns(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """(panel, line, steps, values) of every number in a log."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key in _NO_CURVE:
                continue
            for line, number in value.items() if isinstance(value, dict) else [(key, value)]:
                steps, values = found.setdefault((key, line), ([], []))
                steps.append(record["step"])
                values.append(math.nan if number is None else number)
    for (panel, line), (steps, values) in found.items():
        yield panel, line, steps, values


def _ordered(panels: dict[str, dict[str, Series]]) -> dict[str, dict[str, Series]]:
    """The loss, its parts, the validation metrics, the learning rate."""

    def rank(name: str) -> int:
        return 0 if name == "loss" else 3 if name == "lr" else 2 if name.startswith("val_") else 1

    return {name: panels[name] for name in sorted(panels, key=rank)}


def _postfix(record: Mapping[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{record['loss']:.4g}", "clips/s": f"{record['clips'] / max(record['seconds'], 1e-9):.1f}"}
    if "val_mse" in record:
        shown["val_mse"] = f"{record['val_mse']:.4g}"
    return shown


def cut(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that the run goes on from, so that no step is told twice."""
    if path.is_file():
        write_file(path, "".join(f"{line}\n" for line, record in _whole_lines(path) if record["step"] <= step))


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log, and what they tell; without the line that a kill or a full disk cut short."""
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield line, record
