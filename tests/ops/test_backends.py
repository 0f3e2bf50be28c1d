"""How a backend is chosen; which one serves a GPU, by what it is and what was compiled, with GPUs not there."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vpfast
from vpfast.ops import _backend, _gpu, _native
from vpfast.ops._backend import BackendError, Backends
from vpfast.ops._tracing import constant_in_traces

T4, A100, RTX4090, H200, B200, THOR, RTX5090 = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0)


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("8.0", [A100, (8, 6), RTX4090], [T4, H200, B200]),
        ("8.6", [(8, 6), RTX4090], [A100, H200]),
        ("9.0", [H200], [A100, B200]),
        ("9.0a", [H200], [A100, B200, RTX5090]),
        ("9.0a+PTX", [H200], [B200]),
        ("10.0", [B200, (10, 3)], [H200, THOR, RTX5090]),
        ("10.0f", [B200, (10, 3)], [H200, RTX5090]),
        ("10.0f+PTX", [B200, (10, 3)], [H200, RTX5090]),
        ("12.0+PTX", [RTX5090, (12, 1), (13, 0)], [T4, H200, B200, THOR]),
        ("8.0+PTX", [A100, H200, B200, RTX5090], [T4]),
    ],
)
def test_what_an_architecture_runs_on(architecture, runs, does_not):
    assert all(_gpu.runs_on(architecture, capability) for capability in runs)
    assert not any(_gpu.runs_on(architecture, capability) for capability in does_not)


@pytest.fixture
def machine(monkeypatch):
    """A machine with these GPUs, an extension built for these architectures ("" for a CPU build), and Triton."""

    def make(*gpus, built_for="", triton=True, interpreted=False, extension=True, driver="13.1"):
        def capability(index=None):
            return gpus[index or 0]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU {index or 0}")
        monkeypatch.setattr(_native, "extension", Extension(built_for, driver) if extension else None)
        monkeypatch.setattr(_native, "build_record", lambda: {"built": "none", "reason": "no nvcc was found"})
        monkeypatch.setattr(_backend, "_HAS_TRITON", triton)
        monkeypatch.setattr(_backend, "_INTERPRETED", interpreted)
        for cached in (_gpu.built_for, _gpu.cuda_versions, _gpu._capability):
            cached.cache_clear()
        return Backends("ops.some_op", ("cpu", "cuda") if built_for else ("cpu",), triton=True)

    yield make
    for cached in (_gpu.built_for, _gpu.cuda_versions, _gpu._capability):
        cached.cache_clear()


class Extension:
    def __init__(self, architectures, driver):
        self.architectures, self.driver = architectures, driver

    def build_info(self):
        return {"cuda_architectures": self.architectures, "cuda": "13.0" if self.architectures else None}

    def cuda_of_driver(self):
        return self.driver


def test_the_compiled_kernel_comes_first(machine):
    some_op = machine(H200, built_for="9.0a")
    assert some_op.select("cuda") == some_op.select("cuda:0") == some_op.select(torch.device("cuda", 0)) == "native"
    assert some_op.select("cpu") == "native"
    assert some_op.refusal("triton", "cuda") is None


def test_triton_serves_a_gpu_that_nothing_was_compiled_for(machine):
    some_op = machine(B200, built_for="8.0;9.0a")
    assert some_op.select("cuda") == "triton"
    with vpfast.backend("native"), pytest.raises(BackendError) as refused:
        some_op.select("cuda")
    for part in ("8.0, 9.0a", "GPU 0 has compute capability 10.0", "TORCH_CUDA_ARCH_LIST", 'backend("reference")'):
        assert part in str(refused.value)


def test_a_driver_older_than_the_build_leaves_the_gpu_to_triton(machine):
    some_op = machine(H200, built_for="9.0a", driver="12.8")
    assert some_op.select("cuda") == "triton"
    assert some_op.select("cpu") == "native"
    assert "compiled with CUDA 13.0 and the driver knows CUDA 12.8; install" in some_op.refusal("native", "cuda")
    assert machine(H200, built_for="9.0a", driver="13.0").select("cuda") == "native"
    assert "TORCH_CUDA_ARCH_LIST" in machine(T4, built_for="9.0a", driver="12.8").refusal("native", "cuda")


def test_each_gpu_is_judged_by_itself(machine):
    some_op = machine(H200, T4, RTX4090, built_for="9.0a")
    assert [some_op.serves("native", f"cuda:{k}") for k in range(3)] == [True, False, False]
    assert [some_op.serves("triton", f"cuda:{k}") for k in range(3)] == [True, False, True]


def test_an_old_gpu_is_refused_by_both_with_reasons(machine):
    some_op = machine(T4, built_for="9.0a")
    with pytest.raises(BackendError) as refused:
        some_op.select("cuda")
    said = str(refused.value)
    assert "native: the extension holds code for 9.0a and GPU 0 has compute capability 7.5" in said
    assert "triton: Triton needs compute capability 8.0 or later, and GPU 0 has compute capability 7.5" in said


def test_without_cuda_in_the_build_the_reason_is_told(machine):
    some_op = machine(H200)
    assert some_op.select("cuda") == "triton"
    assert some_op.refusal("native", "cuda") == "the extension was built without CUDA (no nvcc was found)"
    some_op = machine(H200, triton=False)
    with pytest.raises(BackendError, match=r"native: .* without CUDA .*; triton: Triton is not installed \(pip"):
        some_op.select("cuda")


def test_without_an_extension_triton_serves_the_gpu(machine):
    some_op = machine(H200, extension=False)
    some_op.native = ()
    assert (some_op.select("cuda"), some_op.select("cpu")) == ("triton", "reference")
    assert "built without compiled kernels (no nvcc was found)" in some_op.refusal("native", "cuda")


def test_the_interpreter_serves_the_cpu_and_never_a_gpu(machine):
    some_op = machine(H200, interpreted=True)
    assert some_op.serves("triton", "cpu")
    assert some_op.select("cpu") == "native"
    with pytest.raises(BackendError, match="triton: Triton's interpreter is switched on"):
        some_op.select("cuda")
    some_op = machine(H200)
    assert "TRITON_INTERPRET=1" in some_op.refusal("triton", "cpu")
    assert some_op.refusal("triton", "meta") == "Triton kernels need a CUDA tensor, not meta"


def test_an_operator_without_a_cuda_source_says_so(machine):
    machine(H200, built_for="9.0a")
    attention = Backends("ops.some_op", ("cpu",), triton=True, cuda_source=False)
    assert attention.select("cuda") == "triton"
    assert "by design: on a GPU Triton serves it" in attention.refusal("native", "cuda")
    assert attention.refusal("native", "meta") == "no compiled kernel for meta tensors (there is one for: cpu)"


@pytest.mark.parametrize(("gpu", "wanted"), [(H200, "native"), (B200, "triton")])
def test_the_choice_can_be_traced(machine, monkeypatch, gpu, wanted):
    truly_available = torch.cuda.is_available
    some_op = machine(gpu, built_for="9.0a")
    assert some_op.select("cuda:0") == wanted
    monkeypatch.setattr(torch.cuda, "is_available", truly_available)  # tracing would use the GPU

    def step(x):
        return x + 1 if some_op.select("cuda:0") == wanted else x - 1

    torch.compiler.reset()
    assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1


def test_constants_of_a_trace_are_those_of_torch():
    """The mark is torch's own, set without importing its compiler, and so does importing vpfast."""
    ours, theirs = (mark(lambda: 1) for mark in (constant_in_traces, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}
    code = "import sys, vpfast.ops; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_gpu_is_asked_once(machine, monkeypatch):
    some_op = machine(H200, built_for="9.0a")
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: asked.append(index) or H200)
    for _ in range(3):
        assert some_op.select(torch.device("cuda", 0)) == "native"
    assert asked == [0]


# --- the choice -------------------------------------------------------------------------------------------------------

names = st.sampled_from(_backend.NAMES)


@pytest.fixture(autouse=True)
def the_choice_stays(monkeypatch):
    monkeypatch.setattr(_backend, "_chosen", "auto")
    yield
    assert not _backend._open_blocks


programs = st.recursive(
    st.just(()),
    lambda inner: st.lists(st.tuples(st.sampled_from(["choose", "block", "block again", "call"]), names, inner)),
    max_leaves=20,
)


@given(programs)
def test_a_block_restores_what_was_chosen_before_it(program):
    kept = {name: vpfast.backend(name) for name in _backend.NAMES}

    def run(program, chosen):
        vpfast.backend(chosen)
        for kind, name, body in program:
            if kind == "choose":
                vpfast.backend(name)
                chosen = name
            elif kind == "call":
                vpfast.backend(name)(run)(body, name)
            else:
                with vpfast.backend(name) if kind == "block" else kept[name]:
                    assert vpfast.current_backend() == name
                    run(body, name)
            assert vpfast.current_backend() == chosen

    run(program, "auto")


@given(st.lists(names, min_size=1, max_size=5).flatmap(lambda opened: st.tuples(*[st.permutations(opened)] * 2)))
def test_blocks_may_end_in_any_order(orders):
    vpfast.backend("auto")
    opened = {name: vpfast.backend(name) for name in _backend.NAMES}
    vpfast.backend("auto")
    for name in orders[0]:
        opened[name].__enter__()
    for name in orders[1]:
        opened[name].__exit__(None, None, None)
    assert vpfast.current_backend() == "auto"


def test_a_statement_is_undone_by_its_own_block_alone():
    chosen = vpfast.backend("reference")
    assert vpfast.current_backend() == "reference"
    with chosen:
        assert vpfast.current_backend() == "reference"
    assert vpfast.current_backend() == "auto"
    vpfast.backend("native")
    with chosen, chosen:
        assert vpfast.current_backend() == "reference"
    assert vpfast.current_backend() == "native"


def test_a_function_can_be_decorated():
    @vpfast.backend("reference")
    def asked(more=()):
        """What is chosen in it."""
        return [vpfast.current_backend(), *(each() for each in more)]

    assert vpfast.current_backend() == "auto"
    assert asked([asked, vpfast.current_backend]) == ["reference", ["reference"], "reference"]
    assert vpfast.current_backend() == "auto"
    assert (asked.__name__, asked.__doc__) == ("asked", "What is chosen in it.")
    with pytest.raises(TypeError, match="not iterable"):
        asked(1)
    assert vpfast.current_backend() == "auto"
    torch.compiler.reset()

    def step(x):
        return x + (asked() == ["reference"])

    assert torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1


def generator():
    yield


async def coroutine():
    pass


@pytest.mark.parametrize("function", [generator, coroutine, int, "name"])
def test_what_cannot_be_decorated_changes_nothing(function):
    with pytest.raises(TypeError, match="decorates ordinary functions, got"):
        vpfast.backend("reference")(function)
    assert vpfast.current_backend() == "auto"
