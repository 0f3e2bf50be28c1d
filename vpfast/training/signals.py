"""Being asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one of a kind acts as it did before."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.getsignal(signum)
            signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
