"""Where a model runs: never on a device that an operator cannot be served on."""

import pytest
import torch

from vpfast.cli.doctor import operators
from vpfast.ops import _gpu, backend
from vpfast.ops._backend import BackendError, Backends
from vpfast.training import device
from vpfast.training.device import pick_device


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which PyTorch sees a GPU; takes the device types that have a kernel."""

    def make(*native):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(_gpu, "capability", lambda index: None)  # one that everything runs on
        monkeypatch.setattr(device, "OPERATORS", (Served(native),))
        device._say.cache_clear()

    return make


class Served(Backends):
    """An operator with kernels as declared, whatever was built here."""

    def __init__(self, native):
        super().__init__("ops.some_op", native, triton=False)

    def refusal(self, name, device):
        if name == "native":
            return None if device in self.native else f"no compiled kernel for {device}"
        return super().refusal(name, device)


def test_a_gpu_is_taken_where_every_operator_has_a_kernel(gpu, capsys):
    gpu("cpu", "cuda")
    assert pick_device("auto").type == "cuda"
    assert pick_device("cpu").type == "cpu"
    assert capsys.readouterr().err == ""


def test_a_gpu_without_kernels_is_left_and_it_is_said_once(gpu, capsys):
    gpu("cpu")
    assert pick_device("auto").type == "cpu"
    assert pick_device("auto").type == "cpu"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("running on the CPU", "some_op", "no compiled kernel for cuda", "VPFAST_BACKEND=reference"):
        assert part in said


def test_the_reference_runs_on_a_gpu_when_asked_for(gpu):
    gpu("cpu")
    with backend("reference"):
        assert pick_device("auto").type == "cuda"


def test_a_backend_that_serves_no_device_is_refused_at_once(gpu):
    gpu("cpu")
    with backend("triton"), pytest.raises(BackendError, match="some_op"):
        pick_device("auto")


def test_every_operator_is_asked():
    assert {each.op for each in device.OPERATORS} == {f"ops.{name}" for name in operators()}
