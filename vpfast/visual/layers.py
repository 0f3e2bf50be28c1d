"""What a hierarchical code of frames holds, layer by layer, as PNGs."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vpfast.visual._frames import Pixels, check_rows, to_pixels
from vpfast.visual._grid import Bar, Cell, Column, colour_map, write_grid

_EXACT_PSNR = 100.0
_BEYOND = 1 / 200  # of the positions may be stronger than the last colour: a few of them would leave the rest dark


def write_depths(
    path: str | os.PathLike[str],
    frames: Tensor,
    made: Mapping[str, Tensor],
    notes: Mapping[str, str] | None = None,
    max_rows: int = 4,
    dpi: int = 150,
) -> None:
    """Write a PNG of frames and, beside each, its reconstructions from more and more layers (paper, Fig. 5).

    Below each stands its PSNR in dB, frames clipped to [0, 1].

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey.
        made: name -> clip of the same shape, a column each.
        notes: a line below some of the names.
        max_rows: at most so many frames are shown, evenly spread over the clip.
        dpi: dots an inch; a square frame is 1.3 inches wide.

    Raises:
        TypeError, ValueError: clips that cannot be shown together; names the clip.
        ImportError: without matplotlib; says what to install.
    """
    pixels, _ = check_rows({"frames": frames, **made}, 0)
    for name, clip in made.items():
        _check_shape(name, clip, frames)
    steps = _spread(len(frames), max_rows)
    columns = [_frames_column(pixels["frames"], steps)]
    for name, clip in made.items():
        cells = _compared(pixels[name], clip, frames, steps)
        columns.append(Column(name, (notes or {}).get(name, ""), cells))
    write_grid(path, columns, _row_names(steps), None, dpi)


def write_code_maps(
    path: str | os.PathLike[str],
    frames: Tensor,
    indices: Tensor,
    codebook_size: int,
    strict_tree: bool = True,
    max_rows: int = 4,
    dpi: int = 150,
) -> None:
    """Write a PNG of frames and, beside each, which codeword every layer chose where (paper, Fig. 4).

    A colour ranks a codeword among those that stood for choice there, all of its own codebook: by the mean brightness,
    over the whole clip, of the pixels that it was chosen for, darkest to brightest. Below a layer's name stands how
    many of its codewords the clip uses.

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey.
        indices: integer (T, h, w, n), the local index of each of the n layers, in [0, ``codebook_size``).
        codebook_size: M, codewords in one codebook.
        strict_tree: whether the codewords chosen before it decide which codebook a layer chose from; if not, each layer
            has one.
        max_rows, dpi: as in :func:`write_depths`.

    Raises:
        TypeError, ValueError: frames or indices that cannot be shown.
        ImportError: without matplotlib; says what to install.
    """
    pixels = to_pixels(frames)
    _check_maps("indices", indices, len(frames))
    if indices.is_floating_point() or indices.min() < 0 or indices.max() >= codebook_size:
        raise ValueError(f"indices must be integers from 0 to {codebook_size - 1}, got {_range(indices)}")
    steps = _spread(len(frames), max_rows)
    colours = colour_map("viridis")
    columns = [_frames_column(pixels, steps)]
    chosen = indices.detach().cpu().long()
    light = _brightness(pixels, list(chosen.shape[1:3])).flatten()
    path_of = torch.zeros_like(chosen[..., 0]).flatten()
    for layer in range(chosen.shape[-1]):
        local = chosen[..., layer].flatten()
        row = path_of * codebook_size + local
        ranks, used = _ranks(row, path_of, light)
        path_of = torch.unique(row, return_inverse=True)[1] if strict_tree else path_of
        maps = colours[(ranks * 255).round().int().numpy()].reshape(*chosen.shape[:3], 3)
        size = codebook_size ** (layer + 1 if strict_tree else 1)
        cells = [Cell(_enlarged(maps[step], pixels.shape[1:3])) for step in steps]
        columns.append(Column(f"layer {layer + 1}", f"{used} of {size} codewords", cells))
    bar = Bar(colours, "for the darkest pixels", "for the brightest")
    write_grid(path, columns, _row_names(steps), bar, dpi)


def write_heat_maps(
    path: str | os.PathLike[str], frames: Tensor, strengths: Tensor, max_rows: int = 4, dpi: int = 150
) -> None:
    """Write a PNG of frames and, beside each, how much every layer says where, laid over the frame (paper, Fig. 4).

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey.
        strengths: (T, h, w, n), at least 0: of each of n layers, such as how far the codeword that it adds lies from
            the average one. A layer's colours reach to the number below its name, which one position in 200 exceeds.
        max_rows, dpi: as in :func:`write_depths`.

    Raises:
        TypeError, ValueError: frames or strengths that cannot be shown.
        ImportError: without matplotlib; says what to install.
    """
    pixels = to_pixels(frames)
    _check_maps("strengths", strengths, len(frames))
    if not strengths.is_floating_point() or not torch.isfinite(strengths).all() or strengths.min() < 0:
        raise ValueError(f"strengths must be finite numbers of at least 0, got {_range(strengths)}")
    steps = _spread(len(frames), max_rows)
    colours = colour_map("inferno")
    columns = [_frames_column(pixels, steps)]
    for layer, maps in enumerate(strengths.detach().float().cpu().unbind(-1)):
        most = float(np.quantile(maps.numpy(), 1 - _BEYOND, method="higher"))
        heat = _smooth((maps[steps] / (most or 1)).clamp(max=1), pixels.shape[1:3])
        cells = [Cell(_laid_over(colours, heat[at], pixels[step])) for at, step in enumerate(steps)]
        columns.append(Column(f"layer {layer + 1}", f"up to {most:.2g}", cells))
    write_grid(path, columns, _row_names(steps), Bar(colours, "nothing", "most of the layer"), dpi)


def write_repairs(
    path: str | os.PathLike[str],
    frames: Tensor,
    runs: Mapping[str, Mapping[str, Tensor]],
    max_rows: int = 2,
    dpi: int = 150,
) -> None:
    """Write a PNG of frames and, beside each, how it was made worse and what came of that (paper, Fig. 6).

    Args:
        frames: (T, C, H, W), float in [0, 1] or uint8, RGB or grey: the frames as they were. Below each other picture
            stands its PSNR to these in dB, both clipped to [0, 1].
        runs: name -> column -> clip of the same shape; the same columns in every run, the worsened clip first. The runs
            lie below each other.
        max_rows: at most so many frames are shown of a run, evenly spread over the clip.
        dpi: as in :func:`write_depths`.

    Raises:
        TypeError, ValueError: clips that cannot be shown together; names the clip.
        ImportError: without matplotlib; says what to install.
    """
    if not runs or len({tuple(clips) for clips in runs.values()}) > 1:
        raise ValueError(
            f"runs must be at least one, all of the same columns, got {[list(each) for each in runs.values()]}"
        )
    steps = _spread(len(frames), max_rows)
    real = _frames_column(to_pixels(frames), steps).cells
    columns = [Column("frame", "", [*real] * len(runs))]
    for name in next(iter(runs.values())):
        cells: list[Cell] = []
        for run, clips in runs.items():
            _check_shape(f"{name} of {run}", clips[name], frames)
            cells += _compared(to_pixels(clips[name], name), clips[name], frames, steps)
        columns.append(Column(name, "", cells))
    write_grid(path, columns, [f"{run}: {row}" for run in runs for row in _row_names(steps)], None, dpi)


def _check_shape(name: str, clip: Tensor, frames: Tensor) -> None:
    if clip.shape != frames.shape:
        raise ValueError(f"{name} has the shape {tuple(clip.shape)}, must have that of frames, {tuple(frames.shape)}")


def _compared(pixels: Pixels, clip: Tensor, frames: Tensor, steps: list[int]) -> list[Cell]:
    """The frames at ``steps``, with their PSNR below."""
    errors = _psnr(clip[steps], frames[steps])
    return [Cell(pixels[step], f"{dB:.1f} dB") for step, dB in zip(steps, errors, strict=True)]


def _frames_column(pixels: Pixels, steps: list[int]) -> Column:
    return Column("frame", "", [Cell(pixels[step]) for step in steps])


def _row_names(steps: list[int]) -> list[str]:
    return [str(step + 1) for step in steps]


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` steps, from 0, the first and the last among them."""
    if most < 1:
        raise ValueError(f"max_rows must be at least 1, got {most}")
    steps: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return steps


def _check_maps(name: str, maps: Tensor, count: int) -> None:
    if maps.dim() != 4 or maps.shape[0] != count or 0 in maps.shape:
        raise ValueError(f"{name} must be (T, h, w, n) for the {count} frames, got {tuple(maps.shape)}")


def _range(values: Tensor) -> str:
    low, high = (bound.item() for bound in torch.aminmax(values))
    return f"{values.dtype} from {low:.4g} to {high:.4g}"


def _psnr(made: Tensor, real: Tensor) -> list[float]:
    """Of each frame, in dB."""
    errors = (_unit(made) - _unit(real)).square().flatten(1).mean(dim=1)
    dB: list[float] = (-10 * torch.log10(errors.clamp(min=10 ** (-_EXACT_PSNR / 10)))).tolist()
    return dB


def _unit(frames: Tensor) -> Tensor:
    if frames.is_floating_point():
        return frames.detach().cpu().double().clamp(0, 1)
    return frames.cpu().double() / 255


def _brightness(pixels: Pixels, size: list[int]) -> Tensor:
    """The mean of the pixels at each position of a coarser grid: (T, h, w)."""
    grey = torch.from_numpy(pixels).float().mean(dim=3)
    return adaptive_avg_pool2d(grey[:, None], (size[0], size[1]))[:, 0]


def _ranks(rows: Tensor, groups: Tensor, light: Tensor) -> tuple[Tensor, int]:
    """Of each element, all (N,), the rank of its row among the rows of its group by their mean ``light``: 0 to 1.

    Also how many rows there are. A row without a sibling has rank 0.5.
    """
    _, row = torch.unique(rows, return_inverse=True)
    count = int(row.max()) + 1
    mean = torch.bincount(row, light.double(), count) / torch.bincount(row, minlength=count)
    group = torch.zeros(count, dtype=torch.int64).scatter_(0, row, groups)
    order = sorted(range(count), key=lambda index: (int(group[index]), float(mean[index])))
    ranks = torch.empty(count)
    sizes = torch.bincount(group)
    place, before = 0, -1
    for index in order:
        place = place + 1 if group[index] == before else 0
        before, siblings = int(group[index]), int(sizes[group[index]]) - 1
        ranks[index] = place / siblings if siblings else 0.5
    return ranks[row], count


def _enlarged(image: Pixels, size: tuple[int, ...]) -> Pixels:
    """Nearest, to the size of a frame."""
    tall = np.repeat(image, size[0] // image.shape[0], axis=0)
    return np.repeat(tall, size[1] // image.shape[1], axis=1)


def _smooth(maps: Tensor, size: tuple[int, ...]) -> NDArray[np.float32]:
    """(K, h, w) -> (K, *size), bilinear."""
    return interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0].numpy()


def _laid_over(colours: Pixels, heat: NDArray[np.float32], frame: Pixels) -> Pixels:
    """Colours for ``heat`` in [0, 1], lighter and darker where the frame is lighter and darker than on average."""
    grey: NDArray[Any] = frame.astype(np.float32).mean(axis=2, keepdims=True)
    warm = colours[(heat * 255).round().astype(int)]
    laid: Pixels = (warm + 0.25 * (grey - grey.mean())).round().clip(0, 255).astype(np.uint8)
    return laid
