"""Clips beside each other as one labelled film."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpfast.visual._frames import check_rows

PAPER, INK, PALE = (255, 255, 255), (31, 41, 55), (209, 213, 219)
GIVEN, PREDICTED = (156, 163, 175), (37, 99, 235)

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
    height, width = next(iter(pixels.values())).shape[1:3]
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be a whole number from 1 on, got {scale}")
    factor = scale or max(1, 256 // max(height, width))
    label = _font()
    cell = max(width * factor, *(int(label.getlength(name)) for name in pixels))
    film = []
    for step in range(steps):
        images = {}
        for name, clip in pixels.items():
            at = step - (steps - len(clip))
            images[name] = clip[at].repeat(factor, axis=0).repeat(factor, axis=1) if at >= 0 else None
        film.append(_draw(images, (cell, width * factor, height * factor), step, steps, context))
    return torch.from_numpy(np.stack(film)).permute(0, 3, 1, 2).contiguous()


def _draw(images: Mapping[str, Any], sizes: tuple[int, int, int], step: int, steps: int, context: int) -> Any:
    """One frame of the film; ``sizes`` are the widths of a cell and of a picture, and a picture's height."""
    from PIL import Image, ImageDraw

    cell, width, height = sizes
    top = _MARGIN + _TEXT + 8
    canvas = Image.new("RGB", (_MARGIN + len(images) * (cell + _MARGIN), top + height + 3 * _MARGIN + _TEXT + 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    font = _font()
    colour = GIVEN if step < context else PREDICTED
    for column, (name, image) in enumerate(images.items()):
        left = _MARGIN + column * (cell + _MARGIN)
        draw.text((left + cell // 2, _MARGIN + _TEXT // 2), name, INK, font, anchor="mm")
        left += (cell - width) // 2
        box = (left - _BORDER, top - _BORDER, left + width + _BORDER - 1, top + height + _BORDER - 1)
        if image is None:
            draw.rectangle(box, outline=PALE)
        else:
            draw.rectangle(box, outline=colour, width=_BORDER)
            canvas.paste(Image.fromarray(image), (left, top))

    bar = top + height + _MARGIN
    length = canvas.width - 2 * _MARGIN
    for at in range(steps):
        x0, x1 = _MARGIN + length * at // steps, _MARGIN + length * (at + 1) // steps - 2
        reached = GIVEN if at < context else PREDICTED
        draw.rectangle((x0, bar, max(x0, x1), bar + 3), fill=reached if at <= step else PALE)
    note = f"{step + 1} / {steps}"
    if context:
        note += "   given" if step < context else "   predicted"
    draw.text((canvas.width // 2, bar + 10 + _TEXT // 2), note, INK if step < context else colour, font, anchor="mm")
    return np.asarray(canvas)


def _font() -> Any:
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise ImportError("labelled films need Pillow: pip install 'vpfast[cli]'") from error
    return ImageFont.load_default(_TEXT)
