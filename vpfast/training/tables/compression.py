"""Table 1 of the S-HR-VQVAE paper: how much smaller codes are than frames, by the sizes of two files on a disk."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vpfast.models import HRVQVAE, Codes
from vpfast.training.device import Device, pick_device
from vpfast.training.tables.shrvqvae import (
    TABLE_1_CAPTION,
    TABLE_1_COLUMNS,
    TABLE_1_NAME,
    TABLE_1_ROWS,
    TABLE_1_SOURCE,
)


@dataclass(frozen=True)
class Compression:
    """What a model made of some frames, in bytes of files.

    Attributes:
        frames: how many.
        frame_bytes: of the file with their 8-bit samples and nothing else.
        code_bytes: of the file with their codes, as ``vpfast encode`` writes it.
        header_bytes: of that, before the first index.
    """

    frames: int
    frame_bytes: int
    code_bytes: int
    header_bytes: int

    @property
    def ratio(self) -> float:
        """Of the two files."""
        return self.frame_bytes / self.code_bytes

    @property
    def ratio_without_header(self) -> float:
        """What the ratio tends to for many frames: the header stays the same."""
        return self.frame_bytes / (self.code_bytes - self.header_bytes)


@torch.no_grad()
def compress(model: HRVQVAE, clips: Iterable[Tensor], device: Device = "auto") -> Compression:
    """Write the frames of ``clips``, each (T, C, H, W) in [0, 1], and their codes into two files, and look at them.

    The codes are read back from their file and compared. Both files are gone afterwards.

    Raises:
        ValueError: no clip.
        RuntimeError: the file does not hold the codes that were written.
    """
    place = pick_device(device)
    model = model.to(place).eval()
    parts: list[Codes] = []
    with TemporaryDirectory(prefix="vpfast-") as folder:
        raw, coded = Path(folder) / "frames.raw", Path(folder) / "frames.vpc"
        with raw.open("wb") as file:
            for clip in clips:
                file.write((clip * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes())
                parts.append(model.encode(clip.to(place)).to("cpu"))
        if not parts:
            raise ValueError("no clip was given, so there is nothing to compress")
        codes = Codes.cat(parts)
        coded.write_bytes(codes.to_bytes())
        if Codes.from_bytes(coded.read_bytes()) != codes:
            raise RuntimeError(f"{coded} does not hold the codes that were written")
        return Compression(len(codes), raw.stat().st_size, coded.stat().st_size, codes.header_bytes)


def configuration(model: HRVQVAE, size: tuple[int, int]) -> dict[str, str]:
    """The rows of the table that describe a model for frames of ``size``, (H, W)."""
    config = model.config
    height, width = (side // config.multiple for side in size)
    words = [str(config.codebook_size**layer) for layer in range(1, config.layers + 1)]
    return {
        "Input size": f"{size[0]}x{size[1]}x{config.in_channels}",
        "Bits of an input sample": "8",
        "Latent size": f"{height}x{width}x{config.latent_channels}",
        "Quantized latent size": f"{height}x{width}",
        "Hierarchy layers": str(config.layers),
        "Codebook size": str(config.codebook_size),
        "Codewords in layers": ", ".join(words if len(words) < 5 else [*words[:2], "...", words[-1]]),
    }


def markdown(
    models: Mapping[str, HRVQVAE], measured: Mapping[str, Compression], size: tuple[int, int], clips: str
) -> str:
    """The page: the paper's columns, then ours, and what the last line is made of."""
    ours = {name: configuration(model, size) for name, model in models.items()}
    headings = ["", *TABLE_1_COLUMNS, *(f"**{name}**" for name in models)]
    lines = [f"# {TABLE_1_CAPTION}", "", f"Printed: {TABLE_1_SOURCE}.", ""]
    lines += ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for label, printed in TABLE_1_ROWS.items():
        cells = [f"**{ours[name].get(label) or _short(measured[name].ratio)}**" for name in models]
        lines.append("| " + " | ".join([label, *printed, *cells]) + " |")
    lines += [
        "",
        f"**Bold**: vpfast, on {clips}. Its compression is the size of one file divided by that of another:",
        "",
    ]
    lines += [f"- {name}: {_in_words(found)}" for name, found in measured.items()]
    lines += [
        "",
        "The paper's bit rate of 8 is bits of an input sample. Its compression leaves out what a file needs beside the "
        "codes: sizes, checksums, and which model they belong to. The more frames, the less that counts.",
    ]
    return "\n".join(lines)


def to_dict(
    models: Mapping[str, HRVQVAE], measured: Mapping[str, Compression], size: tuple[int, int], clips: str
) -> dict[str, Any]:
    """Plain numbers, lists and strings, ready for JSON."""
    printed = [
        {"from": "paper", "method": name, **{label: values[index] for label, values in TABLE_1_ROWS.items()}}
        for index, name in enumerate(TABLE_1_COLUMNS)
    ]
    ours = [
        {"from": "vpfast", "method": name, **configuration(model, size), "Compression": measured[name].ratio}
        for name, model in models.items()
    ]
    files = {
        name: {**asdict(each), "ratio": each.ratio, "ratio_without_header": each.ratio_without_header}
        for name, each in measured.items()
    }
    return {
        "table": TABLE_1_NAME,
        "caption": TABLE_1_CAPTION,
        "source": TABLE_1_SOURCE,
        "clips": clips,
        "columns": printed + ours,
        "measured": files,
    }


def _in_words(found: Compression) -> str:
    return (
        f"{found.frames:,} frames are {found.frame_bytes:,} bytes with 8 bits a sample, {found.code_bytes:,} as codes: "
        f"{_short(found.ratio)} times smaller, or {_short(found.ratio_without_header)} times without the "
        f"{found.header_bytes} bytes of the file's header"
    )


def _short(ratio: float) -> str:
    return f"{ratio:.2f}"
