"""Watching a run on clips that it is not trained on, each process on its share of them."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast.metrics import EXACT_PSNR
from vpfast.training.config import TrainConfig
from vpfast.training.recipes import Recipe, Sampling, perplexity


@torch.no_grad()
def validate(
    recipe: Recipe, model: nn.Module, clips: Dataset[Tensor], config: TrainConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """What the log tells of the validation clips, frames clipped to [0, 1]; the same in every process.

    ``val_mse``: mean squared error of what the run is judged by. ``val_psnr``: by name, the mean over frames of each
    frame's PSNR. ``val_perplexity``: by name, where codewords are counted. ``val_`` and the name of a score: its mean
    for every layer of codes, where codes are predicted.
    """
    model.eval()
    mine = range(accelerator.process_index, len(clips), accelerator.num_processes)  # type: ignore[arg-type]
    # A process without a clip takes part in the sums all the same: it looks at the first one, and counts it as nothing.
    chunks = [list(mine[at : at + config.batch_size]) for at in range(0, len(mine), config.batch_size)]
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    judged = ""
    for chunk in chunks or [[0]]:
        frames = torch.stack([clips[index] for index in chunk]).to(accelerator.device)
        with accelerator.autocast():
            compared = recipe.compare(model, frames, config.context, Sampling())
        judged = compared.judged
        for name, made in compared.made.items():
            _add(sums, name, _sums(made, compared.real) * bool(chunks))
        for name, chosen in compared.counts.items():
            _add(counts, name, chosen * bool(chunks))
        for name, score in compared.scores.items():
            _add(scores, name, score.double().sum(dim=0) * bool(chunks))
    means = {name: _means(accelerator.reduce(each, "sum")) for name, each in sums.items()}
    record: dict[str, Any] = {
        "val_mse": means[judged][0],
        "val_psnr": {name: round(psnr, 4) for name, (_, psnr) in means.items()},
    }
    if counts:
        totals = {name: accelerator.reduce(each, "sum") for name, each in counts.items()}
        record["val_perplexity"] = {name: round(perplexity(each), 4) for name, each in totals.items()}
    for name, each in scores.items():
        mean = accelerator.reduce(each, "sum") / len(clips)  # type: ignore[arg-type]
        record[f"val_{name}"] = {f"layer {number}": round(score, 5) for number, score in enumerate(mean.tolist(), 1)}
    return record


@torch.no_grad()
def sample(
    recipe: Recipe, model: nn.Module, clips: Dataset[Tensor], config: TrainConfig, accelerator: Accelerator
) -> tuple[dict[str, Tensor], int]:
    """The first of the clips and what the model makes of it, (T, C, H, W) each, and how many of its frames are given.

    Nothing is drawn: the random state stays as it is. For one process alone, which no other has to wait for.
    """
    model.eval()
    frames = clips[0].unsqueeze(0).to(accelerator.device)
    with accelerator.autocast():
        compared = recipe.compare(model, frames, config.context, Sampling())
    given = frames[0, : frames.shape[1] - compared.real.shape[1]]
    rows = {name: torch.cat([given, made[0].float().clamp(0, 1)]) for name, made in compared.made.items()}
    return {"truth": frames[0], **rows}, given.shape[0]


def _add(sums: dict[str, Tensor], name: str, found: Tensor) -> None:
    sums[name] = sums[name] + found if name in sums else found


def _sums(made: Tensor, real: Tensor) -> Tensor:
    """Summed squared error and PSNR of the frames, and how many frames there are: (3,), float64."""
    errors = (made.float().clamp(0, 1) - real.float()).double().square().flatten(2).mean(dim=2)
    psnr = -10 * torch.log10(errors.clamp(min=10 ** (-EXACT_PSNR / 10)))
    return torch.stack([errors.sum(), psnr.sum(), errors.new_tensor(errors.numel())])


def _means(sums: Tensor) -> tuple[float, float]:
    mse, psnr, frames = sums.tolist()
    return mse / frames, psnr / frames
