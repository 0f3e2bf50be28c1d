"""The errors of a trained model on held-out clips, beside those of the simplest prediction there is."""

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vpfast.metrics import Report, VideoMetrics
from vpfast.models import MSPN
from vpfast.training.device import Device, pick_device

MODEL, BASELINE = "prediction", "repeat last frame"


def evaluate(
    model: MSPN,
    clips: Dataset[Tensor],
    context: int,
    batch_size: int = 8,
    progress: bool = False,
    device: Device = "auto",
) -> dict[str, Report]:
    """Reports under the default protocol, of the model and of repeating the last real frame.

    ``clips`` are (T, C, H, W) in [0, 1]; the frames after the first ``context`` ones are those to predict.
    """
    chosen = pick_device(device)
    model = model.to(chosen).eval()
    metrics = {MODEL: VideoMetrics(), BASELINE: VideoMetrics()}
    for frames in tqdm(DataLoader(clips, batch_size), desc="evaluate", unit="batch", disable=not progress, leave=False):
        frames = frames.to(chosen)
        seen, future = frames[:, :context], frames[:, context:]
        prediction = model.predict(seen, horizon=future.shape[1])
        metrics[MODEL].update(prediction, future)
        metrics[BASELINE].update(seen[:, -1:].expand_as(future), future)
    return {name: metric.compute() for name, metric in metrics.items()}


def markdown(reports: dict[str, Report]) -> str:
    """The means side by side, then the model's errors frame by frame."""
    names = list(next(iter(reports.values())).mean)
    lines = ["| mean | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for title, report in reports.items():
        lines.append(f"| {title} | " + " | ".join(f"{report.mean[name]:.5g}" for name in names) + " |")
    return "\n".join([*lines, "", reports[MODEL].markdown()])
