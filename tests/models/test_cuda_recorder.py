"""What is asked of torch.cuda to record and to order work: a log of the calls stands in its place."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from vpfast.models._graphs import CudaLanes, CudaRecorder

DEVICE = torch.device("cuda", 0)


class Log(list[str]):
    """What was called, in order; the stream that is current."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = 0
        self.current = FakeStream(self)


class FakeStream:
    device = DEVICE

    def __init__(self, log: Log) -> None:
        self.log, self.name = log, f"s{log.streams}"
        log.streams += 1

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return f"mark of {self.name}"


class FakeGraph:
    fails_at_the_end = False

    def __init__(self, log: Log) -> None:
        self.log = log

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.log.append(f"begin on {self.log.current.name} in {pool}, {capture_error_mode}")

    def capture_end(self) -> None:
        self.log.append(f"end on {self.log.current.name}")
        if self.fails_at_the_end:
            raise RuntimeError("the capture was invalidated")

    def replay(self) -> None:
        self.log.append(f"replay on {self.log.current.name}")

    def reset(self) -> None:
        self.log.append("reset")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    pools = iter(range(100))

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        before, log.current = log.current, stream
        try:
            yield
        finally:
            log.current = before

    fakes: dict[str, Any] = {
        "device": lambda device: nullcontext(),
        "Stream": lambda: FakeStream(log),
        "CUDAGraph": lambda: FakeGraph(log),
        "graph_pool_handle": lambda: f"pool {next(pools)}",
        "current_stream": lambda device=None: log.current,
        "stream": on,
        "synchronize": lambda: log.append("synchronize"),
        "is_current_stream_capturing": lambda: False,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    return log


def test_work_is_recorded_on_a_side_stream_after_it_was_warmed_up_there(log: Log) -> None:
    recorder = CudaRecorder(DEVICE)
    assert not recorder.busy()

    def work() -> int:
        log.append(f"work on {log.current.name}")
        return 7

    with recorder.turn():
        recording = recorder.capture(work)
        recording.replay()
    recording.release()
    assert recording.result == 7
    assert log == [
        "s1 waits for s0",
        "work on s1",
        "work on s1",
        "synchronize",
        "begin on s1 in pool 0, thread_local",  # what keeps the pool
        "end on s1",
        "begin on s1 in pool 0, thread_local",
        "work on s1",
        "end on s1",
        "s0 waits for s1",
        "replay on s0",
        "s0 marks",
        "reset",
    ]


@pytest.mark.parametrize("fails_at_the_end", [False, True])
def test_work_that_fails_is_told_as_it_was_and_its_memory_given_up(
    log: Log, monkeypatch: pytest.MonkeyPatch, fails_at_the_end: bool
) -> None:
    recorder = CudaRecorder(DEVICE)
    recorder.capture(lambda: None).release()
    calls = iter(range(3))

    def work() -> None:
        if next(calls) == 2:  # not while it is warmed up
            monkeypatch.setattr(FakeGraph, "fails_at_the_end", fails_at_the_end)
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        recorder.capture(work)
    assert log[-2:] == ["end on s1", "s0 waits for s1"]  # before the memory of what failed is used again
    assert log.current.name == "s0"
    monkeypatch.setattr(FakeGraph, "fails_at_the_end", False)
    log.clear()
    recorder.capture(lambda: None)
    assert log.count("begin on s1 in pool 1, thread_local") == 2


def test_a_pool_is_used_again_once_all_recordings_are_released(log: Log) -> None:
    recorder = CudaRecorder(DEVICE)
    for _ in range(2):
        recorder.capture(lambda: None).release()
    assert log.count("begin on s1 in pool 0, thread_local") == 3  # one of them keeps it
    assert log.count("reset") == 2


def test_turns_come_one_after_another_on_whichever_stream(log: Log) -> None:
    recorder, first, other = CudaRecorder(DEVICE), log.current, FakeStream(log)
    log.clear()
    with recorder.turn():
        pass
    with torch.cuda.stream(other), pytest.raises(KeyError), recorder.turn():  # type: ignore[arg-type]
        raise KeyError
    with recorder.turn():
        pass
    assert log == [
        f"{first.name} marks",
        f"{other.name} waits for mark of {first.name}",
        f"{other.name} marks",
        f"{first.name} waits for mark of {other.name}",
        f"{first.name} marks",
    ]


def test_lanes_begin_and_end_with_the_current_stream(log: Log) -> None:
    lanes = CudaLanes(DEVICE, 2)
    kept = torch.zeros(1)
    with lanes.forked():
        with lanes.lane(0):
            log.append(f"work on {log.current.name}")
        lanes.keep(kept, None)
        with lanes.lane(1, after=[0]):
            log.append(f"work on {log.current.name}")
        assert lanes._kept == [kept, None]
    assert lanes._kept == []
    assert log == [
        "s1 waits for s0",
        "s2 waits for s0",
        "work on s1",
        "s2 waits for s1",
        "work on s2",
        "s0 waits for s1",
        "s0 waits for s2",
    ]
