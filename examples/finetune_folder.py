"""Fine-tune an MSPN on a folder of videos. Needs ``pip install 'vpfast[cli]'``.

    python examples/finetune_folder.py run/weights VIDEOS tuned --steps 2000

Every fifth video is held out. The weights that predict the held-out videos best are kept.
"""

import argparse
import itertools
from glob import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vpfast.data import VideoFolder, find_videos
from vpfast.metrics import VideoMetrics
from vpfast.models import MSPN, load, save
from vpfast.models.mspn import pixel_loss


def error(model: MSPN, clips: DataLoader[Tensor], context: int, horizon: int) -> float:
    """Mean squared error of the predictions for held-out videos."""
    metrics = VideoMetrics()
    model.eval()
    for clip in clips:
        metrics.update(model.predict(clip[:, :context], horizon).clamp(0, 1), clip[:, context:])
    model.train()
    return metrics.compute().mean["mse"]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a folder that vpfast.models.save or vpfast train wrote")
    parser.add_argument("videos", type=Path, help="a folder of videos, or of folders of frames")
    parser.add_argument("out", help="the folder of the new weights")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="measure on the held-out videos every so many steps")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--context", type=int, default=10)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--cache", help="the folder for decoded videos (default: that of VideoFolder)")
    return parser


def main() -> None:
    parser = options()
    asked = parser.parse_args()
    model = load(asked.weights)
    if not isinstance(model, MSPN):
        parser.error(f"{asked.weights} holds a {type(model).__name__}, must be an MSPN")
    names = [path.relative_to(asked.videos).as_posix() for path in find_videos(asked.videos)]
    if len(names) < 2:
        parser.error(f"{asked.videos} holds one video; two are needed, one to train on and one held out")
    apart = [escape(name) for name in names[::5]]
    shape = {"size": asked.size, "channels": model.config.in_channels, "fit": "crop"}
    given = {"length": asked.context + asked.horizon, "cache": asked.cache, **shape}
    seen = DataLoader(VideoFolder(asked.videos, exclude=apart, **given), asked.batch, shuffle=True)
    unseen = DataLoader(VideoFolder(asked.videos, include=apart, **given), asked.batch)

    optimizer = torch.optim.Adam(model.parameters(), lr=asked.lr)
    best = error(model, unseen, asked.context, asked.horizon)
    save(model, asked.out)
    print(f"before: {best:.5f}")
    endless = itertools.chain.from_iterable(itertools.repeat(seen))
    for step, clips in enumerate(itertools.islice(endless, asked.steps), 1):
        loss = pixel_loss(model(clips[:, : asked.context], asked.horizon), clips, norm="mse")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % asked.every == 0 or step == asked.steps:
            now = error(model, unseen, asked.context, asked.horizon)
            print(f"step {step}: {now:.5f}{', the best' if now < best else ''}")
            if now < best:
                best = now
                save(model, asked.out)


if __name__ == "__main__":
    main()
