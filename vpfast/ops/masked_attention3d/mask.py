"""Which keys a query of a clip may see: rules on (t, y, x), never a tensor that is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

RULES: dict[str, Rule] = {
    "raster": lambda tk, jk, t, j: (tk < t) | ((tk == t) & (jk <= j)),
    "raster_strict": lambda tk, jk, t, j: (tk < t) | ((tk == t) & (jk < j)),
    "past_frames": lambda tk, jk, t, j: tk < t,
    "separable": lambda tk, jk, t, j: (tk <= t) & (jk <= j),
    "eq6": lambda tk, jk, t, j: (tk < t) & (jk < j),
}
"""Name -> is key (tk, jk) visible to query (t, j)? t counts frames, j raster positions in a frame."""

Window = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Mask3d:
    """The keys (t', y', x') that query (t, y, x) sees; j = y W + x is the raster position in the frame.

    ======================  ============================================================
    ``"raster"``            t' < t, or t' = t and j' <= j
    ``"raster_strict"``     t' < t, or t' = t and j' < j
    ``"past_frames"``       t' < t
    ``"separable"``         t' <= t and j' <= j
    ``"eq6"``               t' < t and j' < j: S-HR-VQVAE paper, Eq. 6, literally
    ======================  ============================================================

    A value: two masks of the same rule and window are equal and hash alike. The README of this folder draws each.

    Args:
        name: one of the five above.
        window: the radii (t, y, x) beyond which a key is hidden too: it is seen at most so many frames, rows and
            columns away. Each 0 or more, or None for no limit on that axis.

    Raises:
        ValueError: an unknown name, or a window that is not three radii; the message holds what was given.
    """

    name: str
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"Mask3d: name {self.name!r} is unknown; choose one of {', '.join(map(repr, RULES))}")
        if self.window is not None:
            object.__setattr__(self, "window", _checked_window(self.window))

    @property
    def radii(self) -> list[int]:
        """The window as the operators take it: three radii, -1 for no limit."""
        return [-1 if radius is None else radius for radius in self.window or (None, None, None)]

    @classmethod
    def of_radii(cls, name: str, radii: Sequence[int]) -> "Mask3d":
        """The mask from what the operators take: its name and :attr:`radii`."""
        t, y, x = (None if radius < 0 else radius for radius in radii)
        return cls(name, (t, y, x))

    def visible(self, grid: Sequence[int], queries: Tensor | None = None) -> Tensor:
        """The mask written out: for the reference, tests and drawings. Kernels follow the rules instead.

        Args:
            grid: (T, H, W).
            queries: (n,) int64, raster positions in the grid, whose rows are wanted; all of them when None.

        Returns:
            (n, T H W) bool on the device of ``queries``: row a query, column a key, True where the query sees the key.
        """
        frames, height, width = grid
        frame = height * width
        keys = torch.arange(frames * frame, device=None if queries is None else queries.device)
        of_queries = (keys if queries is None else queries)[:, None]
        seen = RULES[self.name](keys // frame, keys % frame, of_queries // frame, of_queries % frame)
        key_at, query_at = ((p // frame, p % frame // width, p % width) for p in (keys, of_queries))
        for key_axis, query_axis, radius in zip(key_at, query_at, self.window or (), strict=False):
            if radius is not None:
                seen = seen & ((key_axis - query_axis).abs() <= radius)
        return seen

    def pairs(self, grid: Sequence[int]) -> int:
        """How many pairs of a query and a key that it sees there are in a grid (T, H, W)."""
        near = [_near(size, radius) for size, radius in zip(grid, self.window or (None,) * 3, strict=True)]
        frames, frame = grid[0], grid[1] * grid[2]
        earlier, anywhere = (near[0] - frames) // 2, near[1] * near[2]
        before, up_to = (anywhere - frame) // 2, (anywhere + frame) // 2
        return {
            "raster": earlier * anywhere + frames * up_to,
            "raster_strict": earlier * anywhere + frames * before,
            "past_frames": earlier * anywhere,
            "separable": (earlier + frames) * up_to,
            "eq6": earlier * before,
        }[self.name]


def _near(size: int, radius: int | None) -> int:
    """Pairs of places on an axis that are at most ``radius`` apart, each with itself among them."""
    reach = size - 1 if radius is None else min(radius, size - 1)
    return size + 2 * sum(size - apart for apart in range(1, reach + 1))


def _checked_window(window: Sequence[int | None]) -> Window | None:
    """The window as a tuple; None where no axis has a limit."""
    wrong = f"Mask3d: window must be three radii (t, y, x), each an int >= 0 or None for no limit, got {window!r}"
    try:
        t, y, x = (None if radius is None else index(radius) for radius in window)
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if any(radius is not None and radius < 0 for radius in (t, y, x)):
        raise ValueError(wrong)
    return None if t is y is x is None else (t, y, x)
