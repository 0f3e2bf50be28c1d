"""The errors of a trained model on held-out clips, under the default protocol, side by side with what to hold it to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpfast.metrics import Report, VideoMetrics
from vpfast.training.device import Device, pick_device
from vpfast.training.recipes import perplexity, recipe_of


@dataclass(frozen=True)
class CodeUse:
    """How much of a codebook was used: codewords it has, codewords chosen at all, exp of the entropy of the choice."""

    codewords: int
    used: int
    perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """What came of all clips: a report by name, the use of a codebook by the same names, and the name that counts."""

    reports: dict[str, Report]
    codes: dict[str, CodeUse]
    judged: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        results = {name: report.to_dict() for name, report in self.reports.items()}
        for name, use in self.codes.items():
            results[name]["codes"] = vars(use)
        return results

    def markdown(self, per_frame: bool) -> str:
        """The means side by side and, with ``per_frame``, below them the errors that count frame by frame."""
        names = list(self.reports[self.judged].mean)
        more = ["codewords used", "perplexity"] if self.codes else []
        lines = ["| mean | " + " | ".join([*names, *more]) + " |", "|---|" + "---:|" * len([*names, *more])]
        for title, report in self.reports.items():
            cells = [f"{report.mean[name]:.5g}" for name in names]
            if title in self.codes:
                use = self.codes[title]
                cells += [f"{use.used} of {use.codewords}", f"{use.perplexity:.1f}"]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.reports[self.judged].markdown()] if per_frame else lines)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    clips: Dataset[Tensor],
    context: int,
    batch_size: int = 8,
    progress: bool = False,
    device: Device = "auto",
) -> Evaluation:
    """What the model makes of ``clips``, (T, C, H, W) in [0, 1], beside what its kind is compared with.

    Of a model that predicts, the frames after the first ``context`` ones are those to predict, and repeating the last
    real frame stands beside it. One that makes frames again is given all of them, and the depths stand side by side.
    """
    chosen = pick_device(device)
    model = model.to(chosen).eval()
    recipe = recipe_of(model)
    metrics: dict[str, VideoMetrics] = {}
    counts: dict[str, Tensor] = {}
    judged = ""
    hidden = None if progress else True  # None: shown on a terminal alone
    for frames in tqdm(DataLoader(clips, batch_size), desc="evaluate", unit="batch", disable=hidden, leave=False):
        compared = recipe.compare(model, frames.to(chosen), context)
        judged = compared.judged
        for name, made in compared.made.items():
            metrics.setdefault(name, VideoMetrics()).update(made, compared.real)
        for name, chosen_codes in compared.counts.items():
            counts[name] = counts[name] + chosen_codes if name in counts else chosen_codes
    codes = {name: CodeUse(len(each), int((each > 0).sum()), perplexity(each)) for name, each in counts.items()}
    return Evaluation({name: metric.compute() for name, metric in metrics.items()}, codes, judged)
