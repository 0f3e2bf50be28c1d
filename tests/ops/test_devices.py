"""No operator takes tensors of two devices: a kernel would read addresses of the one on the other.

Where there is no GPU the other device is meta, and what is asked is the operators' fakes and Triton's launcher; the
checks of the CUDA kernels are compiled for the host in test_codeword_search_cuda_host.py.
"""

import pytest
import torch
from operators import ONE_EACH, WITHOUT_TRITON

from vpfast.ops import _library

GPU = torch.cuda.is_available()
HERE, OTHER = ("cuda:0", "cpu") if GPU else ("cpu", "meta")


OPERATORS = {name: problem.arguments() for name, problem in ONE_EACH.items()}
# What no kernel is there for: attention on a GPU but Triton's, and convolutions in planes there.
CASES = [
    (name, variant)
    for name in OPERATORS
    for variant in _library.VARIANTS
    if not (GPU and "attention" in name and variant == "") and not (name in WITHOUT_TRITON and (GPU or variant))
]


def moved(given, device):
    return [t.to(device) for t in given] if isinstance(given, list) else given.to(device)


def is_tensor(given):
    return isinstance(given[0] if isinstance(given, list) else given, torch.Tensor)


def with_one_elsewhere(name):
    """The arguments with each but the first that holds tensors moved in turn, and its name."""
    schema = getattr(torch.ops.vpfast, name).default._schema
    names = [argument.name for argument in schema.arguments]
    here = [moved(given, HERE) if is_tensor(given) else given for given in OPERATORS[name]]
    for k, given in enumerate(here):
        if k > 0 and is_tensor(given):
            yield names[k], [*here[:k], moved(given, OTHER), *here[k + 1 :]]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_an_operator_refuses_tensors_of_two_devices(name, variant):
    for argument, arguments in with_one_elsewhere(name):
        with pytest.raises(RuntimeError, match=r"is on .* and .* on .*; move one of them") as refusal:
            getattr(torch.ops.vpfast, name + variant)(*arguments)
        told = str(refusal.value).partition("; move one")[0]
        assert all(f"on {device}" in told for device in (HERE, OTHER))
        assert argument.removesuffix("s") in told  # the CUDA kernels say "a codebook"


@pytest.mark.parametrize("name", [name for name in OPERATORS if "losses" not in name and name not in WITHOUT_TRITON])
def test_the_launcher_of_triton_refuses_tensors_of_two_devices(name):
    room = next(room for room in ("codeword_search", "edlstm_gates", "masked_attention3d") if name.startswith(room))
    launch = _library._Launcher(room, name)
    for argument, arguments in with_one_elsewhere(name):
        with pytest.raises(RuntimeError, match=f"{name}_triton: .* and {argument} on {OTHER}; move one of them"):
            launch(*arguments)
