"""``vpfast visualize``: what trained models make of a video, and what the layers of their codes hold, as pictures."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast._files import new_folder
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
    required,
)
from vpfast.cli._options import Help, Options
from vpfast.cli._out import check_out_folder
from vpfast.cli._video import frame_size
from vpfast.data import VideoError, read_video
from vpfast.data.resize import LARGEST
from vpfast.models import HRVQVAE, SHRVQVAE, Codes
from vpfast.training import TrainConfig
from vpfast.training.device import pick_device
from vpfast.training.evaluation import shown
from vpfast.training.recipes import BASELINE, counted, recipe_of
from vpfast.visual import (
    fragment_blur,
    gaussian_blur,
    gaussian_noise,
    salt_and_pepper,
    side_by_side,
    write_code_maps,
    write_depths,
    write_frame_curves,
    write_gif,
    write_heat_maps,
    write_mp4,
    write_repairs,
    write_strip,
)

DESCRIPTION = """Show what trained models make of a video or, where none is given, of a clip of the test split of the
data they were trained on. The output folder receives

  strip.png      what really happened, what each model predicts (or makes again), and the error
  film.gif       what really happened and the predictions side by side
  film.mp4       the same
  curves.png     the errors frame by frame: over all clips in the part of the video that is read, or over --clips

and, where the model of --weights has codes, HR-VQVAE and S-HR-VQVAE,

  depths.png     frames, and what is made of them from the first 1 .. n layers of codes, each with its PSNR
  depths.gif     the same as a film
  codes.png      which codeword every layer chose where
  heatmaps.png   how far every layer's codeword lies from its average over the clip: where the layer has news

and, for each way of making the frames worse that is asked for, one of

  blur.png  fragment.png  noise.png  salt-and-pepper.png

the worsened frames and what is made of them from the first 1 .. n layers, each with its PSNR to the real ones.
--beside.NAME FOLDER shows other weights on the same clips in the first four."""

FRAMES = 60


class Corruption(NamedTuple):
    """A way of making frames worse: at a level, by a draw where it draws."""

    apply: Callable[[Tensor, Any, int], Tensor]
    level: type
    unit: str
    help: str


# By the option, which is also the name of the picture.
CORRUPTIONS = {
    "blur": Corruption(
        lambda frames, sigma, _: gaussian_blur(frames, sigma), float, "px", "Gaussian blur of so many pixels"
    ),
    "fragment": Corruption(
        lambda frames, distance, _: fragment_blur(frames, distance),
        int,
        "px",
        "fragment blur: the mean of four copies, so many pixels apart from the middle",
    ),
    "noise": Corruption(gaussian_noise, float, "dB", "Gaussian noise at this signal-to-noise ratio in dB"),
    "salt-and-pepper": Corruption(salt_and_pepper, float, "of pixels", "white and black pixels, this share of all"),
}

FILES = frozenset(
    {"strip.png", "film.gif", "film.mp4", "curves.png", "depths.png", "depths.gif", "codes.png", "heatmaps.png"}
    | {f"{name}.png" for name in CORRUPTIONS}
)


class Shown(NamedTuple):
    """The clips that are measured, each (T, C, H, W) in [0, 1], that of them which is drawn, the frames that are coded,
    and where they are from."""

    clips: Dataset[Tensor]
    clip: Tensor
    frames: Tensor
    source: str


def run(argv: Sequence[str]) -> int:
    """Predict, encode, decode, draw; returns 0. Nothing is left behind where something fails."""
    model, trained = read_first(argv)
    values = _options(model, trained).parse(argv)
    first = required(model)
    _check(values, first)
    out = Path(values["out"])
    replace = check_out_folder(out, values["force"], FILES)
    video = _read(values, first, trained) if values["video"] else None
    subject = measured(values, first)
    coder = _autoencoder(first)
    given = _from_split(values, subject) if video is None else _from_video(values, subject, video, coder is not None)
    worse = _worsened(given.frames, values)
    with new_folder(out, replace) as folder:
        told = _draw_made(folder, subject, given, values) if len(given.clips) else []  # type: ignore[arg-type]
        if coder is not None:
            told += _draw_layers(folder, coder.to(pick_device(values["device"])), given.frames, worse, values)
    print(*told, f"{given.source}: {out}", sep="\n")
    return 0


def _options(model: nn.Module | None, trained: TrainConfig | None) -> Options:
    options = Options("vpfast visualize", DESCRIPTION)
    options.parser.formatter_class = _Help
    options.parser.add_argument("video", nargs="?", help="a video file, or a folder of frames")
    add_measuring_options(options, model, trained)
    add_protocol_options(options)
    options.add("out", str | None, None, "the folder to write")
    options.add_flag("force", "replace the output of an earlier run")
    options.add("clip", int, 0, "which clip is drawn, from 0")
    options.add("start", int, 0, "of a video: the first frame, from 0")
    options.add("count", int | None, None, f"of a video: at most so many frames (default: {FRAMES}, or one clip)")
    options.parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="of a video: resize the frames (default: as trained)"
    )
    options.add("rows", int, 4, "frames shown in a picture of layers")
    options.add("fps", float, 10.0, "frames a second of the films")
    for name, corruption in CORRUPTIONS.items():
        options.parser.add_argument(
            f"--{name}", type=corruption.level, nargs="+", default=[], metavar="LEVEL", help=corruption.help
        )
    return options


class _Help(Help, argparse.RawDescriptionHelpFormatter):
    """The description as it is written."""


def _check(values: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError for an option that cannot be, or that this model or source has no use for; names the key."""
    if not values["out"]:
        raise ValueError("out: nothing given, must be the folder to write")
    for key, lowest in (("clip", 0), ("start", 0), ("count", 1), ("rows", 1), ("context", 1), ("horizon", 0)):
        if values[key] is not None and values[key] < lowest:
            raise ValueError(f"{key}: {values[key]} given, must be at least {lowest}")
    if not 0 < values["fps"] <= 50:
        raise ValueError(f"fps: {values['fps']} given, must be above 0 and at most 50")
    if values["size"] and not 1 <= min(values["size"]) <= max(values["size"]) <= LARGEST:
        raise ValueError(f"size: {values['size']} given, must be from 1 to {LARGEST} each")
    for key in ("start", "count", "size"):
        if values[key] and not values["video"]:
            raise ValueError(f"{key}: {values[key]} given, must be left out without a video")
    for name in CORRUPTIONS:
        if values[_key(name)] and _autoencoder(model) is None:
            raise ValueError(f"{name}: given, must be left out: a {type(model).__name__} has no codes to repair it")


def _key(name: str) -> str:
    return name.replace("-", "_")


def _autoencoder(model: nn.Module) -> HRVQVAE | None:
    """What turns frames into codes, where the model has it."""
    return model.autoencoder if isinstance(model, SHRVQVAE) else model if isinstance(model, HRVQVAE) else None


def _read(values: dict[str, Any], model: nn.Module, trained: TrainConfig | None) -> Tensor:
    """The frames of the video, (T, C, H, W) in [0, 1]; ``values`` then describe them.

    A model that only codes frames is given all of them as one clip.
    """
    channels: int = model.config.in_channels  # type: ignore[union-attr,assignment]
    count = values["count"] or max(FRAMES, values["context"] + values["horizon"])
    size = frame_size(values["size"], trained)
    fit = values["data"]["fit"]
    frames = read_video(values["video"], size, channels, values["start"], count, fit, at_least=1).float().div(255)
    values["data"] |= {"kind": "video-folder", "root": values["video"], "size": frames.shape[2:], "channels": channels}
    if not recipe_of(model).predicts:
        values["context"] = len(frames)
    return frames


def _from_video(values: Mapping[str, Any], subject: Measured, frames: Tensor, has_codes: bool) -> Shown:
    """The frames cut into clips, one after another; none where they are too few to predict any but can be coded."""
    length = subject.config.clip_length
    clips = [frames[start : start + length] for start in range(0, len(frames) - length + 1, length)]
    video, found = values["video"], counted(len(frames), "frame")
    if not clips and not has_codes:
        raise VideoError(
            f"{video}: {found} read, fewer than the {length} of --context and --horizon; choose fewer of them"
        )
    if not clips:
        print(f"vpfast: {found} of {video} are too few to predict any ({length} needed)", file=sys.stderr)
    elif values["clip"] >= len(clips):
        raise ValueError(f"clip: {values['clip']} given, must be below the {len(clips)} clips of {found}")
    clip = clips[values["clip"]] if clips else frames
    return Shown(clips, clip, frames, f"{found} of {video}")  # type: ignore[arg-type]


def _from_split(values: Mapping[str, Any], subject: Measured) -> Shown:
    clips = held_out(dict(values), subject.config)
    count = len(clips)  # type: ignore[arg-type]
    if values["clip"] >= count:
        raise ValueError(f"clip: {values['clip']} given, must be below the {count} clips measured")
    clip = clips[values["clip"]]
    return Shown(clips, clip, clip, f"clip {values['clip']} of {count} of the {values['split']} split")


def _draw_made(folder: Path, subject: Measured, given: Shown, values: Mapping[str, Any]) -> list[str]:
    """What the models predict or make again, as strip, films and curves; returns a line for each."""
    config, predicts = subject.config, subject.recipe.predicts
    evaluation = evaluated(subject, given.clips, dict(values))
    made = {
        title: shown(model, given.clip, config.context, values["device"], subject.sampling)
        for title, model in subject.titled(evaluation).items()
    }
    context = config.context if predicts else 0
    write_strip(folder / "strip.png", {"truth": given.clip, **made}, context)
    whole = {title: torch.cat([given.clip[:context], clip]) for title, clip in made.items()}
    film = side_by_side({"truth": given.clip, **whole}, context)
    write_gif(folder / "film.gif", film, values["fps"])
    write_mp4(folder / "film.mp4", film, values["fps"])
    clips = counted(len(given.clips), "clip")  # type: ignore[arg-type]
    title = f"Errors frame by frame, mean of {clips}"
    write_frame_curves(folder / "curves.png", frame_errors(evaluation), context + 1, title, quiet={BASELINE})
    if not predicts and len(subject.models) == 1:
        return []  # the layers tell the same
    width = max(map(len, evaluation.reports))
    return [f"{name:>{width}}  {_told(report.mean)}  over {clips}" for name, report in evaluation.reports.items()]


def _draw_layers(
    folder: Path,
    model: HRVQVAE,
    frames: Tensor,
    worse: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
) -> list[str]:
    """What the layers of codes hold of the frames; returns a line for each depth and each way of making them worse."""
    rows = values["rows"]
    codes = _encoded(model, frames)
    made = _by_depth(model, codes)
    notes = {name: _smaller(codes.first(depth)) for depth, name in enumerate(made, start=1)}
    told = [f"{name:>10}  {_told(errors(clip, frames))}  {notes[name]}" for name, clip in made.items()]
    write_depths(folder / "depths.png", frames, made, notes, rows)
    write_gif(folder / "depths.gif", side_by_side({"frame": frames, **made}), values["fps"])
    write_code_maps(folder / "codes.png", frames, codes.indices, codes.codebook_size, model.config.strict_tree, rows)
    write_heat_maps(folder / "heatmaps.png", frames, _news(model, codes), rows)
    for name, given in worse.items():
        runs = {run: {"given": clip, **_by_depth(model, _encoded(model, clip))} for run, clip in given.items()}
        write_repairs(folder / f"{name}.png", frames, runs, rows)
        told += [f"{run}: {_repaired(clips, frames)}" for run, clips in runs.items()]
    return told


def _encoded(model: HRVQVAE, frames: Tensor) -> Codes:
    return model.encode(frames.to(next(model.parameters()).device)).to("cpu")


def _by_depth(model: HRVQVAE, codes: Codes) -> dict[str, Tensor]:
    """The frames of ``codes`` from the first 1 .. n layers, on the CPU."""
    return {counted(depth, "layer"): model.decode(codes, depth).float().cpu() for depth in range(1, codes.layers + 1)}


def _worsened(frames: Tensor, values: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """By picture and run: the frames made worse as it is asked for; ValueError names a level that cannot be."""
    worse: dict[str, dict[str, Tensor]] = {}
    for name, corruption in CORRUPTIONS.items():
        for level in values[_key(name)]:
            try:
                made = corruption.apply(frames, level, values["seed"])
            except ValueError as error:
                raise ValueError(f"--{name} {level}: {error}") from error
            worse.setdefault(name, {})[f"{name} {level:g} {corruption.unit}"] = made
    return worse


def _repaired(clips: Mapping[str, Tensor], frames: Tensor) -> str:
    """How near the frames are to the real ones as they were given, and as they came out of all layers."""
    name = list(clips)[-1]
    return f"{_told(errors(clips['given'], frames))}; from {name} {_told(errors(clips[name], frames))}"


def _told(mean: Mapping[str, float]) -> str:
    return f"PSNR {mean['psnr']:.2f} dB  SSIM {mean['ssim']:.4f}"


def _smaller(codes: Codes) -> str:
    return f"{codes.frame_bytes / codes.payload_bytes:.4g} times smaller"


def _news(model: HRVQVAE, codes: Codes) -> Tensor:
    """How far each layer's codewords lie from their mean over the clip: (T, h, w, n)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        codewords: Tensor = model.quantizer.get_codes_from_indices(codes.indices.to(device)).float().cpu()
    mean = codewords.flatten(1, -2).mean(dim=1)
    distance: Tensor = torch.linalg.vector_norm(codewords - mean[:, None, None, None], dim=-1)
    return distance.movedim(0, -1)
