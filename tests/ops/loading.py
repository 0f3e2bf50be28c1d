"""A program: every operator in a process whose threads run, then in a DataLoader's workers. Its argument is how they
start: fork or spawn. It ends well where all results are those of the parent.

It calls operators in another thread too, while workers start: a fork may come in the midst of a kernel.
"""

import sys
import threading
from typing import Any

import torch
from operators import PROBLEMS, results, same
from torch.utils.data import DataLoader, Dataset

SCALE = 3  # enough for several threads


class Results(Dataset[Any]):
    """Computed by whoever asks: item k holds the results of problem k, and with how many threads."""

    def __init__(self) -> None:
        self.arguments = [problem.arguments(SCALE) for problem in PROBLEMS.values()]

    def __len__(self) -> int:
        return len(PROBLEMS)

    def __getitem__(self, index: int) -> Any:
        return torch.get_num_threads(), results(list(PROBLEMS.values())[index], self.arguments[index])


def main(start: str) -> None:
    torch.set_num_threads(3)
    here = Results()
    expected = [here[k] for k in range(len(here))]
    assert {threads for threads, _ in expected} == {3}

    started = threading.Event()

    def keep_busy() -> None:
        while not started.is_set():
            here[int(torch.randint(len(here), ()))]

    other = threading.Thread(target=keep_busy)
    other.start()
    workers = 2 if start == "fork" else 1  # which takes seconds to import what it needs
    loader = DataLoader(here, batch_size=None, num_workers=workers, multiprocessing_context=start)
    try:
        for index, (threads, found) in enumerate(loader):
            started.set()
            name = list(PROBLEMS)[index]
            assert threads == 1, f"a worker of {start} was given {threads} threads"
            assert same(found, expected[index][1]), f"{name} gives something else in a worker of {start}"
            assert same(here[index][1], found), f"{name} gives something else beside workers of {start}"
    finally:
        started.set()
        other.join()


if __name__ == "__main__":
    main(sys.argv[1])
    print("the same")
