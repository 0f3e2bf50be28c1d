"""The clips of a run: the data set of each split, and which clips every process sees at every step."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vpfast.data import MovingDigits, PreparedClips, VideoError, VideoFolder
from vpfast.data.moving_digits import SPLITS, Split
from vpfast.data.video_folder import find_videos
from vpfast.training.config import DataConfig, SplitConfig


def check_apart(config: DataConfig) -> None:
    """Raise ValueError where two splits of a video folder share a file. Moving digits never share an image."""
    if config.kind != "video-folder" or config.root is None:
        return
    owner: dict[Path, str] = {}
    for split in SPLITS:
        patterns: SplitConfig = getattr(config, split)
        if not patterns.include:
            continue
        with suppress(VideoError):  # a split without files shares none; whoever uses it is told
            for path in find_videos(Path(config.root), patterns.include, patterns.exclude):
                if owner.setdefault(path, split) != split:
                    raise ValueError(f"data.{split}.include: {path} is in the {owner[path]} split too")


def dataset(config: DataConfig, split: Split, length: int, count: int | None = None, seed: int = 0) -> Dataset[Tensor]:
    """The clips of ``split``, each (length, C, H, W) in [0, 1]; ``count`` of them, evenly spaced, where there are more.

    Raises:
        ValueError: the split has no pattern; what the data set itself refuses.
    """
    if config.kind == "moving-digits":
        digits = MovingDigits(
            config.root,
            split=split,
            length=length,
            count=config.clips if count is None else count,
            seed=seed,
            size=config.frame_size[0] * config.supersample,
            digits=config.digits,
            digit_size=config.digit_size * config.supersample,
            speed=config.speed,
        )
        return digits if config.supersample == 1 else AveragedDown(digits, config.supersample)
    clips = _prepared(config, split, length) if config.kind == "prepared" else _videos(config, split, length)
    if count is None or count >= len(clips):
        return clips
    return Subset(clips, torch.linspace(0, len(clips) - 1, count).round().long().tolist())


def _videos(config: DataConfig, split: Split, length: int) -> VideoFolder:
    patterns: SplitConfig = getattr(config, split)
    if not patterns.include:
        raise ValueError(f"data.{split}.include: no pattern given, so the {split} split has no files")
    assert config.root is not None
    return VideoFolder(
        config.root,
        length=length,
        size=config.frame_size,
        channels=config.channels,
        step=config.stride,
        include=patterns.include,
        exclude=patterns.exclude,
        cache=config.cache,
        fit=config.fit,
    )


def _prepared(config: DataConfig, split: Split, length: int) -> PreparedClips:
    patterns: SplitConfig = getattr(config, split)
    assert config.root is not None
    clips = PreparedClips(
        config.root,
        split=split,
        length=length,
        step=config.stride,
        channels=config.channels,
        include=patterns.include or ("*",),
        exclude=patterns.exclude,
    )
    if (clips.size, clips.fit) != (config.frame_size, config.fit):
        raise ValueError(
            f"data.size: {list(config.frame_size)} and data.fit {config.fit} given, but {config.root} was prepared "
            f"otherwise: give data.size {list(clips.size)} and data.fit {clips.fit}, or prepare it again"
        )
    return clips


class AveragedDown(Dataset[Tensor]):
    """The clips of another data set with every square of ``factor`` x ``factor`` pixels averaged."""

    def __init__(self, clips: Dataset[Tensor], factor: int) -> None:
        self.clips, self.factor = clips, factor

    def __len__(self) -> int:
        return len(self.clips)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return avg_pool2d(self.clips[index], self.factor)


class StepBatches(Sampler[list[int]]):
    """The clips of every step, for one process of several.

    All processes walk through one endless list, epoch after epoch, each epoch shuffled by (seed, epoch). Step s takes
    the s-th run of ``batch_size * processes`` clips and process p the p-th part of that. So the order depends on
    nothing but the seed, a run resumes at any step, and several processes see what one with a larger batch sees.
    """

    def __init__(self, size: int, batch_size: int, steps: range, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.size, self.batch_size, self.steps, self.seed = size, batch_size, steps, seed
        self.rank, self.processes = rank, processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.processes + self.rank) * self.batch_size
            yield [self._clip(position) for position in range(first, first + self.batch_size)]

    def _clip(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[place])


def loader(clips: Dataset[Tensor], batches: Sampler[list[int]], workers: int, pin: bool) -> DataLoader[Tensor]:
    """A loader that leaves the process's random state alone."""
    return DataLoader(
        clips,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
        persistent_workers=False,
    )
