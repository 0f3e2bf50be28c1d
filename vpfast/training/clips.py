"""The clips of a run: the data set of each split, and which clips every process sees at every step."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vpfast.data import MovingDigits, VideoFolder
from vpfast.training.config import DataConfig

SPLITS = ("train", "val", "test")


def dataset(config: DataConfig, split: str, length: int, count: int | None = None, seed: int = 0) -> Dataset[Tensor]:
    """The clips of ``split``, each (length, C, H, W) in [0, 1]; ``count`` of them, evenly spaced, where there are more.

    Raises:
        ValueError: the split has no clip, or shares a file with another; what the data set itself refuses.
    """
    if config.kind == "moving-digits":
        return MovingDigits(
            config.root,
            split=split,
            length=length,
            count=config.clips if count is None else count,
            seed=seed,
            size=config.frame_size[0],
            digits=config.digits,
            digit_size=config.digit_size,
        )
    patterns = getattr(config, split)
    if not patterns.include:
        raise ValueError(f"data.{split}.include: no pattern given, so the {split} split has no files")
    assert config.root is not None
    clips = VideoFolder(
        config.root,
        length=length,
        size=config.frame_size,
        channels=config.channels,
        step=config.stride,
        include=patterns.include,
        exclude=patterns.exclude,
        cache=config.cache,
    )
    if count is None or count >= len(clips):
        return clips
    return Subset(clips, torch.linspace(0, len(clips) - 1, count).round().long().tolist())


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
