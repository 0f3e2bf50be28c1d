"""Predict the next frame of a camera, again and again. Needs ``pip install 'vpfast[cli]'``.

    python examples/predict_camera.py run/weights /dev/video0        # a webcam of Linux, by FFmpeg
    python examples/predict_camera.py run/weights clip.mp4 --pace    # a video in place of one, at its own speed

A thread reads the camera and keeps only the newest frame. A frame that arrives while another is being predicted is
dropped, so the prediction never lags behind. ``vpfast predict --live`` does this for video files and reports more.
"""

import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import av
import torch
from torch import Tensor

import vpfast
from vpfast.data import resize_frames, to_grey
from vpfast.models import MSPN, SHRVQVAE, load

SIZE = (64, 64)


def camera(source: str, pace: bool) -> Iterator[Tensor]:
    """RGB frames as they arrive, uint8 (C, H, W)."""
    with av.open(source, format="v4l2" if source.startswith("/dev/") else None) as video:
        rate = float(video.streams.video[0].average_rate or 25)
        begin = time.monotonic()
        for count, frame in enumerate(video.decode(video=0)):
            if pace:
                time.sleep(max(0.0, begin + count / rate - time.monotonic()))
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


def newest(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """The newest frame at each call; older frames that were not taken are dropped."""
    waiting: queue.Queue[Tensor | Exception | None] = queue.Queue(maxsize=1)

    def put(item: Tensor | Exception | None) -> None:
        if isinstance(item, Tensor):  # the end drops no frame: it waits until the last one is taken
            with suppress(queue.Empty):
                waiting.get_nowait()
        waiting.put(item)

    def read() -> None:
        try:
            for frame in frames:
                put(frame)
            put(None)
        except Exception as error:  # told where the frames are used
            put(error)

    threading.Thread(target=read, daemon=True).start()
    while (item := waiting.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def prepared(frame: Tensor, channels: int) -> Tensor:
    """uint8 RGB (3, H, W) -> float (channels, *SIZE) in [0, 1], as ``vpfast.data`` makes the clips of training."""
    sized = resize_frames(frame.unsqueeze(0) if channels == 3 else to_grey(frame.unsqueeze(0)), SIZE)
    return sized[0].float() / 255


def main(weights: str, source: str, *options: str) -> None:
    trained = load(weights)
    if not isinstance(trained, MSPN | SHRVQVAE):
        raise SystemExit(f"{weights} holds a {type(trained).__name__}, must be an MSPN or an SHRVQVAE")
    model = vpfast.optimize(trained)
    stream = vpfast.Stream(model)
    predicted, frames, error = None, 0, 0.0
    for seen in newest(camera(source, "--pace" in options)):
        frame = prepared(seen, model.config.in_channels)
        if predicted is not None:  # of this very frame, before it was seen
            error += float((predicted - frame).square().mean())
        predicted = stream.push(frame)  # show it, send it on
        frames += 1
    print(f"{frames} frames, mean squared error of the predictions {error / max(1, frames - 1):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
