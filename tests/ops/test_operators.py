"""What PyTorch expects of an operator, of every operator alike: opcheck, strides, threads, vmap.

The ladder of each holds what is its own: formula, accuracy, gradients, autocast. Public functions under transforms and
compilation are in test_operators_transformed.py, a DataLoader's workers in test_operators_in_workers.py.
"""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from operators import FUNCTIONS, IN_PLACE, LAYOUTS, ONE_EACH, PROBLEMS, WITHOUT_TRITON, laid_out, results, same
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from vpfast.ops import _native
from vpfast.ops._library import VARIANTS

needs_extension = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")

COMPILED_ALONE = {"sample_codes", "sample_frame", "tile_program"}
TRITON_ALONE = {"leaky_sum__triton", "signed_errors_triton"}  # in test_fused_maps.py


# --- which there are -------------------------------------------------------------------------------------------------


def test_every_operator_is_here():
    importlib.import_module("vpfast.ops._fused_maps")  # which a pass on a GPU alone needs
    registered = {
        name.removeprefix("vpfast::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vpfast::")
    }
    here = {problem.operator for problem in FUNCTIONS.values()}
    assert {problem.operator for problem in IN_PLACE.values()} <= COMPILED_ALONE
    assert registered == {
        *(name + variant for name in here - WITHOUT_TRITON for variant in VARIANTS),
        *WITHOUT_TRITON,
        *COMPILED_ALONE,
        *TRITON_ALONE,
        *OF_MODULES,
    }


# --- opcheck and strides ---------------------------------------------------------------------------------------------


def for_opcheck(problem, arguments):
    """The arguments, those that the operator is differentiable in asking for a gradient."""

    def leaf(t):
        return t.detach().requires_grad_() if t.is_floating_point() else t

    pairs = zip(problem.names, arguments, strict=True)
    return tuple(
        tree_map_only(torch.Tensor, leaf, given) if name in problem.differentiable_in else given
        for name, given in pairs
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", ONE_EACH.values(), ids=ONE_EACH)
def test_opcheck(problem, layout):
    torch.library.opcheck(problem.overload, for_opcheck(problem, laid_out(problem.arguments(), layout)))


@pytest.mark.parametrize("problem", ONE_EACH.values(), ids=ONE_EACH)
def test_opcheck_of_nothing(problem):
    torch.library.opcheck(problem.overload, for_opcheck(problem, problem.arguments(scale=0)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_result_in_every_layout(poisoned, name, layout):
    problem = FUNCTIONS[name]
    given = laid_out(problem.arguments(), layout)
    found, expected = (results(problem, each) for each in (given, laid_out(given, "contiguous")))
    if _native.extension is None:  # plain PyTorch rounds as numbers lie in memory
        torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert same(found, expected)


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_is_what_the_schema_says(name):
    problem = IN_PLACE[name]
    checks = ("test_schema",) if name == "sample_codes" else ("test_schema", "test_faketensor")
    torch.library.opcheck(problem.overload, problem.arguments(), test_utils=checks)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_memory_of_the_models_lies_as_it_must(name, layout):
    problem = IN_PLACE[name]
    with pytest.raises(RuntimeError, match=f"{name.replace('frame', 'codes')}.*(contiguous|layout|a program is int64)"):
        problem.overload(*laid_out(problem.arguments(), layout))


def codebooks_with_statistics():
    found = FUNCTIONS["codeword_search_train, tree"].arguments()
    z, codebooks, _ = found
    trained = torch.ops.vpfast.codeword_search_train(*found)
    return z, torch.cat(codebooks), trained[1], *trained[3:]


def table():
    return codebooks_with_statistics()[1].requires_grad_(), True


def statistics():
    z, _, indices, counts, sums = codebooks_with_statistics()
    return counts, sums, z, indices, 0, True


def start():
    z, table, _, counts, sums = codebooks_with_statistics()
    return table, counts, sums, torch.tensor(False), z, 8, 3, True, 2, True


OF_MODULES = {"snapshot": table, "share_statistics": statistics, "start_codebooks": start}


# What start_codebooks writes into must have memory of its own, and an expanded tensor has not.
IN_LAYOUTS = [(name, layout) for name in OF_MODULES for layout in LAYOUTS]
IN_LAYOUTS.remove(("start_codebooks", "expanded"))


@pytest.mark.parametrize(("name", "layout"), IN_LAYOUTS)
def test_opcheck_of_what_a_module_calls(name, layout):
    torch.library.opcheck(getattr(torch.ops.vpfast, name).default, laid_out(OF_MODULES[name](), layout))


@needs_extension
def test_the_sampler_says_which_operator_a_trace_takes():
    given = PROBLEMS["sample_codes"].arguments()
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="sample_frame"),
    ):
        torch.ops.vpfast.sample_codes(*given)


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_result_depends_on_the_number_of_threads(isa, threads, name):
    problem = PROBLEMS[name]
    if name == "tile_program":
        _native.extension.select_isa("amx")  # the only one that it has
    given = problem.arguments(scale=2 if isa == "reference" else 4)
    threads(1)
    expected = results(problem, given)
    for count in (2, 5):
        threads(count)
        assert same(results(problem, given), expected), f"{count} threads"


def test_many_python_threads_at_once(threads):
    """Every operator in each of eight threads, each on two of its own, in orders and shapes that differ."""
    threads(2)
    problems = [(problem, problem.arguments(scale, seed=scale)) for problem in PROBLEMS.values() for scale in (1, 2)]
    expected = [results(*each) for each in problems]
    together = threading.Barrier(8)

    def work(rank: int) -> list[int]:
        together.wait()
        order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(rank)).tolist()
        return [k for k in order if not same(results(*problems[k]), expected[k])]

    with ThreadPoolExecutor(8) as pool:
        wrong = [problems[k][0].operator for found in pool.map(work, range(8)) for k in found]
    assert not wrong


@needs_extension
@pytest.mark.alone
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_operator_uses_as_many_threads_as_were_set(threads, name):
    problem = PROBLEMS[name]
    given = problem.arguments(scale=4)

    def started() -> int:
        """How many threads a call starts. OpenMP keeps them for the thread that called, as long as that lives."""
        found = []

        def call():
            before = tasks()
            results(problem, given)
            found.append(len(tasks() - before))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return found[0]

    for count in (1, 3):
        threads(count)
        assert started() == count - 1


def tasks() -> set[str]:
    """The threads of this process, by their numbers."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


# --- vmap ------------------------------------------------------------------------------------------------------------


def tensors_of(problem):
    """Which arguments hold tensors."""
    given = problem.arguments()
    return [
        k for k, value in enumerate(given) if isinstance(value[0] if isinstance(value, list) else value, torch.Tensor)
    ]


def mapped(problem, which):
    """Three sets of arguments that differ in ``which``; the same as one, these stacked along dim 1; and vmap's dims."""
    sets = [problem.arguments(seed=seed) for seed in range(3)]
    each = [tuple(one[k] if k in which else sets[0][k] for k in range(len(one))) for one in sets]
    stacked = tree_map(lambda *t: torch.stack(t, 1) if isinstance(t[0], torch.Tensor) else t[0], *each)
    whole = tuple(stacked[k] if k in which else sets[0][k] for k in range(len(sets[0])))
    return each, whole, tuple(1 if k in which else None for k in range(len(whole)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_of_any_argument(name):
    """Each alone and all together: what a loop over calls gives, to the bit."""
    problem = FUNCTIONS[name]
    every = tensors_of(problem)
    for which in [*([k] for k in every), every]:
        each, whole, dims = mapped(problem, which)
        expected = tree_map(lambda *t: torch.stack(t), *(problem.overload(*one) for one in each))
        found = torch.func.vmap(problem.overload, dims)(*whole)
        assert same(tree_leaves(found), tree_leaves(expected)), which


@pytest.mark.parametrize("name", IN_PLACE)
def test_vmap_of_what_writes_is_one_error(name):
    problem = IN_PLACE[name]
    given = problem.arguments()
    doubled = (torch.stack([given[0]] * 2), *given[1:])
    with pytest.raises(RuntimeError, match=f"^vpfast::{name} writes into .*; a batch of .* give .* the whole batch$"):
        torch.func.vmap(problem.overload, (0, *[None] * (len(given) - 1)))(*doubled)


def test_vmap_over_nothing_is_one_error():
    gates, c_prev, order = FUNCTIONS["edlstm_gates"].arguments()
    with pytest.raises(RuntimeError, match=r"^vpfast::edlstm_gates: .* size 0; leave the call out$"):
        torch.func.vmap(torch.ops.vpfast.edlstm_gates, (0, 0, None))(
            gates.new_empty(0, *gates.shape), c_prev.new_empty(0, *c_prev.shape), order
        )
