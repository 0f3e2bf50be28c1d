"""The errors of a trained model on held-out clips, under a named protocol, side by side with what to hold it to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpfast._optimize import optimize
from vpfast.metrics import Perceptual, Report, VideoMetrics
from vpfast.models import MSPN
from vpfast.training.device import Device, pick_device
from vpfast.training.recipes import BASELINE, Sampling, perplexity, recipe_of

LIKELIEST = Sampling()


@dataclass(frozen=True)
class CodeUse:
    """How much of a codebook was used: the codewords it has, those chosen at all, and the exponential of the entropy of
    the choices."""

    codewords: int
    used: int
    perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """The results over all clips.

    ``reports``: the errors of the model and of what it is compared with, by name. ``judged``: which of these names is
    the model's. ``codes``: by the same names, how much of a codebook was used. ``scores``: by the same names, of a
    model that predicts codes: the name of a score -> its mean for every layer.
    """

    reports: dict[str, Report]
    codes: dict[str, CodeUse]
    judged: str
    scores: dict[str, dict[str, list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        results = {name: report.to_dict() for name, report in self.reports.items()}
        for name, use in self.codes.items():
            results[name]["codes"] = vars(use)
        for name, scores in self.scores.items():
            results[name]["foretold"] = scores
        return results

    def markdown(self, per_frame: bool) -> str:
        """A table of the means and, with ``per_frame``, below it the model's errors frame by frame."""
        names = list(self.reports[self.judged].mean)
        more = ["codewords used", "perplexity"] if self.codes else []
        lines = ["| mean | " + " | ".join([*names, *more]) + " |", "|---|" + "---:|" * len([*names, *more])]
        for title, report in self.reports.items():
            cells = [f"{report.mean[name]:.5g}" for name in names]
            if title in self.codes:
                use = self.codes[title]
                cells += [f"{use.used} of {use.codewords}", f"{use.perplexity:.1f}"]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines += self._foretold()
        if per_frame:
            lines += ["", f"{self.judged}, frame by frame:", "", self.reports[self.judged].markdown()]
        return "\n".join(lines)

    def _foretold(self) -> list[str]:
        """How well each layer of codes is foretold from the real ones before it, where codes are."""
        layers = max((len(each) for scores in self.scores.values() for each in scores.values()), default=0)
        lines = []
        for title, scores in self.scores.items():
            for name, values in scores.items():
                cells = [f"{value:.4f}" for value in values] + [""] * (layers - len(values))
                lines.append(f"| {title}: {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
        if not lines:
            return []
        heading = " | ".join(f"layer {layer}" for layer in range(1, layers + 1))
        return ["", f"| real codes, each from those before it | {heading} |", "|---|" + "---:|" * layers, *lines]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    clips: Dataset[Tensor],
    context: int,
    batch_size: int = 8,
    progress: bool = False,
    device: Device = "auto",
    sampling: Sampling = LIKELIEST,
    protocol: str = "default",
    lpips: bool = False,
) -> Evaluation:
    """The errors of ``model`` on ``clips``, beside a baseline.

    A model that predicts is given the first ``context`` frames of a clip and predicts the others; the baseline repeats
    the last frame that was given. An HRVQVAE encodes and decodes all frames; its reconstructions from the first layer,
    the first two layers and so on are measured side by side.

    Args:
        model: an MSPN, HRVQVAE or SHRVQVAE. It is moved to ``device`` and left there, in evaluation mode.
        clips: each (T, C, H, W) in [0, 1].
        context: the number of frames that are given.
        batch_size: clips at a time.
        progress: show a progress bar on a terminal.
        device: ``"auto"``, the GPU where there is one, or ``"cpu"``.
        sampling: how codes are chosen, of a model that predicts codes.
        protocol: one of ``vpfast.metrics.PROTOCOLS``.
        lpips: measure LPIPS too.

    Raises:
        TypeError: another model.
        ValueError, ImportError, FileNotFoundError: what :class:`vpfast.metrics.VideoMetrics` refuses.
    """
    distance = lpips and Perceptual()
    chosen = pick_device(device)
    model = model.to(chosen).eval()
    recipe = recipe_of(model)
    # Not on a GPU: each size of batch would record a graph first.
    predictor = optimize(model) if isinstance(model, MSPN) and chosen.type == "cpu" else model
    metrics: dict[str, VideoMetrics] = {}
    counts: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    judged = ""
    hidden = None if progress else True  # None: shown on a terminal alone
    for frames in tqdm(DataLoader(clips, batch_size), desc="evaluate", unit="batch", disable=hidden, leave=False):
        compared = recipe.compare(predictor, frames.to(chosen), context, sampling)
        judged = compared.judged
        for name, made in compared.made.items():
            if name not in metrics:
                metrics[name] = VideoMetrics(protocol, distance)
            metrics[name].update(made, compared.real)
        for name, chosen_codes in compared.counts.items():
            counts[name] = counts[name] + chosen_codes if name in counts else chosen_codes
        for name, score in compared.scores.items():
            found = score.double().sum(dim=0)
            scores[name] = scores[name] + found if name in scores else found
    codes = {name: CodeUse(len(each), int((each > 0).sum()), perplexity(each)) for name, each in counts.items()}
    means = {name: (each / len(clips)).tolist() for name, each in scores.items()}  # type: ignore[arg-type]
    reports = {name: metric.compute() for name, metric in metrics.items()}
    return Evaluation(reports, codes, judged, {judged: means} if means else {})


@torch.no_grad()
def shown(
    model: nn.Module, clip: Tensor, context: int, device: Device = "auto", sampling: Sampling = LIKELIEST
) -> Tensor:
    """What is judged of one clip (T, C, H, W): the frames predicted, or made again; on the CPU, in [0, 1]."""
    chosen = pick_device(device)
    model = model.to(chosen).eval()
    compared = recipe_of(model).compare(model, clip.unsqueeze(0).to(chosen), context, sampling)
    return compared.made[compared.judged][0].float().clamp(0, 1).cpu()


def together(evaluations: Mapping[str, Evaluation]) -> Evaluation:
    """Several models on the same clips side by side: what is judged of each under its name, the rest after it.

    What has the same name and numbers in all of them, the simplest prediction there is, stands once, at the end.
    """
    first = next(iter(evaluations))
    reports: dict[str, Report] = {}
    codes: dict[str, CodeUse] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    for title, each in evaluations.items():
        names = {name: f"{title}, {name}" for name in each.reports if name != BASELINE} | {each.judged: title}
        reports |= {names[name]: each.reports[name] for name in names}
        codes |= {names[name]: use for name, use in each.codes.items()}
        scores |= {names[name]: found for name, found in each.scores.items()}
    reports |= {name: report for name, report in evaluations[first].reports.items() if name == BASELINE}
    return Evaluation(reports, codes, first, scores)
