"""Work on many files by several processes, which end with the one that they work for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_bool
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


_MOST = 4096


def check_workers(workers: int) -> None:
    """Raise ValueError where there can be no such number of them."""
    if workers < 0:
        raise ValueError(f"workers: {workers} given, must be at least 0")
    if workers > _MOST:
        raise ValueError(f"workers: {workers} given, must be at most {_MOST}")


def in_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[int, Result]]:
    """(number of the task, its result) as they come, by ``workers`` processes, or in this one where there are none."""
    check_workers(workers)
    if not workers or len(tasks) < 2:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    context = multiprocessing.get_context("fork")
    interrupted = context.RawValue(c_bool, False)
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _begin_worker, (interrupted,)) as pool:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        try:
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        except BrokenProcessPool as error:
            if interrupted.value:  # Ctrl-C, of which a worker has heard first
                raise KeyboardInterrupt from None
            raise OSError(
                "a process that works beside this one ended unexpectedly, killed perhaps for want of memory; try again "
                "with fewer workers"
            ) from error
        finally:
            for waiting in numbers:
                waiting.cancel()


def _begin_worker(interrupted: c_bool) -> None:
    """A worker computes on one core, and ends at once with Ctrl-C or with the process that it works for."""
    torch.set_num_threads(1)

    def end(*_: object) -> None:
        interrupted.value = True
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
