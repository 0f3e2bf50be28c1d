"""Clips beside each other as one labelled film."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpfast.visual._frames import check_rows

PAPER, INK, PALE = (255, 255, 255), (31, 41, 55), (209, 213, 219)
GIVEN, PREDICTED = (156, 163, 175), (37, 99, 235)
Colour = tuple[int, int, int]

_MARGIN, _BORDER, _TEXT = 12, 2, 15


def side_by_side(clips: Mapping[str, Tensor], context: int = 0, scale: int | None = None) -> Tensor:
    """Lay clips side by side with their names above and the step below: uint8 RGB (T, 3, H', W').

    Args:
        clips: name -> (T, C, H, W), float in [0, 1] or uint8, RGB or grey, all of one frame size. A shorter clip is
            shown at the end of the longest: a prediction of the future alone lines up with a truth that has the past.
        context: how many frames at the beginning were given to the model. They have a grey frame and the note
            "given"; the others a blue one and "predicted".
        scale: whole number by which pixels are enlarged (nearest, so that they stay what they are); by default as
            many times as fit into 256 pixels.

    Raises:
        TypeError, ValueError: clips that cannot be shown together; names the clip.
        ImportError: without Pillow; says what to install.
    """
    pixels, steps = check_rows(clips, context)
    film = []
    sizes = _sizes(pixels, next(iter(pixels.values())).shape[1:3], scale)
    for step in range(steps):
        images = {}
        for name, clip in pixels.items():
            at = step - (steps - len(clip))
            images[name] = clip[at] if at >= 0 else None
        film.append(_draw_step(images, sizes, step, steps, context))
    return torch.from_numpy(np.stack(film)).permute(0, 3, 1, 2).contiguous()


def beside(pictures: Mapping[str, Tensor | None], predicted: str, note: str = "", scale: int | None = None) -> Tensor:
    """One frame of such a film, for a video that has no end yet: uint8 RGB (3, H', W').

    Args:
        pictures: name -> (C, H, W), float in [0, 1] or uint8, RGB or grey, all of one size; None leaves its place
            empty, of all but one at most.
        predicted: the name of the one with the blue frame; the others have a grey one.
        note: what stands below.
        scale: as in :func:`side_by_side`.

    Raises:
        TypeError, ValueError: pictures that cannot be shown together; names the picture.
        ImportError: without Pillow; says what to install.
    """
    pixels, _ = check_rows({name: each.unsqueeze(0) for name, each in pictures.items() if each is not None}, 0)
    sizes = _sizes(pictures, next(iter(pixels.values())).shape[1:3], scale)
    images = {name: pixels[name][0] if name in pixels else None for name in pictures}
    colours = {name: PREDICTED if name == predicted else GIVEN for name in pictures}
    canvas, draw = _draw_pictures(images, sizes, colours, _MARGIN // 2 + _TEXT)
    draw.text((canvas.width // 2, canvas.height - _MARGIN - _TEXT // 2), note, INK, _font(), anchor="mm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


class _Sizes(NamedTuple):
    """The widths of a cell and of a picture, a picture's height, and by how much it is enlarged."""

    cell: int
    width: int
    height: int
    factor: int


def _sizes(names: Iterable[str], size: Sequence[int], scale: int | None) -> _Sizes:
    height, width = size
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be a whole number from 1 on, got {scale}")
    factor = scale or max(1, 256 // max(height, width))
    label = _font()
    cell = max(width * factor, *(int(label.getlength(name)) for name in names))
    return _Sizes(cell, width * factor, height * factor, factor)


def _draw_pictures(images: Mapping[str, Any], sizes: _Sizes, colours: Mapping[str, Colour], below: int) -> Any:
    """The pictures (H, W, 3) in a row with their names, and room of so many pixels below them: a canvas to draw on."""
    from PIL import Image, ImageDraw

    top = _MARGIN + _TEXT + 8
    width = _MARGIN + len(images) * (sizes.cell + _MARGIN)
    canvas = Image.new("RGB", (width, top + sizes.height + 2 * _MARGIN + below), PAPER)
    draw = ImageDraw.Draw(canvas)
    font = _font()
    for column, (name, image) in enumerate(images.items()):
        left = _MARGIN + column * (sizes.cell + _MARGIN)
        draw.text((left + sizes.cell // 2, _MARGIN + _TEXT // 2), name, INK, font, anchor="mm")
        left += (sizes.cell - sizes.width) // 2
        box = (left - _BORDER, top - _BORDER, left + sizes.width + _BORDER - 1, top + sizes.height + _BORDER - 1)
        if image is None:
            draw.rectangle(box, outline=PALE)
        else:
            draw.rectangle(box, outline=colours[name], width=_BORDER)
            enlarged = image.repeat(sizes.factor, axis=0).repeat(sizes.factor, axis=1)
            canvas.paste(Image.fromarray(enlarged), (left, top))
    return canvas, draw


def _draw_step(images: Mapping[str, Any], sizes: _Sizes, step: int, steps: int, context: int) -> Any:
    """One frame of the film, with a bar that shows how far it is."""
    colour = GIVEN if step < context else PREDICTED
    canvas, draw = _draw_pictures(images, sizes, dict.fromkeys(images, colour), _MARGIN + _TEXT + 2)
    bar = canvas.height - 2 * _MARGIN - _TEXT - 2
    length = canvas.width - 2 * _MARGIN
    for at in range(steps):
        x0, x1 = _MARGIN + length * at // steps, _MARGIN + length * (at + 1) // steps - 2
        reached = GIVEN if at < context else PREDICTED
        draw.rectangle((x0, bar, max(x0, x1), bar + 3), fill=reached if at <= step else PALE)
    note = f"{step + 1} / {steps}"
    if context:
        note += "   given" if step < context else "   predicted"
    place = (canvas.width // 2, bar + 10 + _TEXT // 2)
    draw.text(place, note, INK if step < context else colour, _font(), anchor="mm")
    return np.asarray(canvas)


def _font() -> Any:
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise ImportError("labelled films need Pillow: pip install 'vpfast[cli]'") from error
    return ImageFont.load_default(_TEXT)
