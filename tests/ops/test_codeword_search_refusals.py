"""Backends of codeword_search and its training form, and what they refuse."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from codebooks import CASES, assert_codes_of_a_float64_search, inputs, native

import vpfast
from vpfast.ops import codeword_search, codeword_search_train
from vpfast.ops.codeword_search import reference


def test_reference_backend_gives_the_same():
    for case in CASES:
        z, codebooks = inputs(*case)
        with vpfast.backend("reference"):
            found = codeword_search(z, codebooks, case[-1])
        assert_codes_of_a_float64_search(found[1], z, codebooks, case[-1])
        codewords = reference.chosen_codewords(found[1], codebooks, case[-1], torch.float32)
        torch.testing.assert_close(found[0], sum(codewords))


@native
def test_without_compiled_kernels_the_same_ladder_holds():
    """The operators are served by the reference then; this process has the kernels, so another one climbs."""
    rungs = "float64_search or large_flat or not_finite or one_loss_alone or no_vectors"
    rungs += " or number_of_threads and (tree or flat)"
    here = Path(__file__).parent
    files = ("test_codeword_search", "test_codeword_search_train", "test_codeword_search_near_ties", "test_operators")
    ladder = [str(here / f"{file}.py") for file in files]
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", rungs, *ladder]
    code = f"import sys; sys.modules['vpfast._C'] = None; import pytest; sys.exit(pytest.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "needs the compiled extension" in done.stdout


def test_refused_backend_says_why():
    z, codebooks = inputs(5, 4, 3, 2)
    meta = z.to("meta"), [codebook.to("meta") for codebook in codebooks]
    with vpfast.backend("triton"), pytest.raises(vpfast.ops._backend.BackendError, match=r"triton: Triton .*not "):
        codeword_search(*meta)
    with pytest.raises(RuntimeError, match=r"vpfast.ops.codeword_search has no backend .* native: .*; triton: "):
        codeword_search(*meta)


F = torch.zeros


@pytest.mark.parametrize("search", [codeword_search, codeword_search_train])
@pytest.mark.parametrize(
    ("z", "codebooks", "strict_tree", "error", "message"),
    [
        (F(5, 4), F(3, 4), True, TypeError, "a sequence of tensors, one a layer, got Tensor"),
        (F(5, 4), [F(3, 4), None], True, TypeError, "a sequence of tensors, one a layer, got list"),
        (F(5, 4), [], True, ValueError, "1 to 16 tensors, got 0"),
        (F(5, 4), [F(2, 4)] * 17, False, ValueError, "1 to 16 tensors, got 17"),
        (F(5), [F(3, 4)], True, ValueError, r"z must be \(N, D\) with D at least 1, got \(5,\)"),
        (F(5, 0), [F(3, 0)], True, ValueError, r"got \(5, 0\)"),
        (F(2, 5, 4), [F(3, 4)], True, ValueError, r"got \(2, 5, 4\)"),
        (F(5, 4), [F(1, 4)], True, ValueError, r"at least 2 codewords, got one of shape \(1, 4\)"),
        (F(5, 4), [F(())], True, ValueError, r"at least 2 codewords, got one of shape \(\)"),
        (F(5, 4), [F(3, 5)], True, ValueError, r"layer 1 of codebooks must be \(3, 4\), got \(3, 5\) \(z is \(5, 4\)"),
        (F(5, 4), [F(3, 4), F(3, 4)], True, ValueError, r"layer 2 .* \(9, 4\), got \(3, 4\) .*strict_tree=True"),
        (F(5, 4), [F(3, 4), F(9, 4)], False, ValueError, r"layer 2 .* \(3, 4\), got \(9, 4\) .*strict_tree=False"),
        (F(5, 4), [F(3, 4), F(9, 4, 1)], True, ValueError, r"layer 2 .* got \(9, 4, 1\)"),
        (F(5, 4).int(), [F(3, 4)], True, TypeError, "float16 or bfloat16, got torch.int32"),
        (F(5, 4), [F(3, 4).double()], True, TypeError, r"type of z \(torch.float32\).* got torch.float64"),
        (F(5, 4).double(), [F(3, 4)], True, TypeError, "got torch.float32"),
        (F(5, 4), [F(3, 4).half()], True, TypeError, "got torch.float16"),
        (F(5, 4).half(), [F(3, 4).bfloat16()], True, TypeError, "got torch.bfloat16"),
        (
            F(5, 4),
            [F(3, 4), F(9, 4).double()],
            True,
            TypeError,
            "torch.float32 in layer 1 and torch.float64 in layer 2",
        ),
        (F(5, 4), [F(3, 4, device="meta")], True, ValueError, "z is on cpu and layer 1 of codebooks on meta"),
    ],
)
def test_refusals_name_what_was_given(search, z, codebooks, strict_tree, error, message):
    with pytest.raises(error, match=rf"^{search.__name__}: .*{message}"):
        search(z, codebooks, strict_tree)


@native
def test_the_kernel_itself_refuses_what_would_read_beyond_memory():
    z, codebooks = inputs(20, 4, 3, 2)
    operators = torch.ops.vpfast
    for short in (codebooks[:1] * 2, [codebooks[0], codebooks[1][:, :3]], []):
        for operator in (operators.codeword_search, operators.codeword_search_train):
            with pytest.raises(RuntimeError, match=r"layer 2 must be \(9, 4\)|1 to 16 codebooks, got 0"):
                operator(z, short, True)
    with pytest.raises(RuntimeError, match="the type of z"):
        operators.codeword_search(z, [codebook.half() for codebook in codebooks], True)
    _, indices, _, counts, sums = operators.codeword_search_train(z, codebooks, True)
    weights = torch.ones(2), torch.ones(2, 2)
    for wrong in (indices + 3, indices - 3):
        with pytest.raises(RuntimeError, match="outside its codebook"):
            operators.codeword_search_backward(z, wrong, codebooks, True)
        with pytest.raises(RuntimeError, match="outside its codebook"):
            operators.codeword_search_train_backward(None, *weights, z, wrong, codebooks, counts, sums, True)
    for wrong in (indices[1:], indices[:, :1], indices.int()):
        with pytest.raises(RuntimeError, match=r"indices must be int64 \(20, 2\)"):
            operators.codeword_search_backward(z, wrong, codebooks, True)
    given = {
        "grad_quantized": z,
        "weights_z": weights[0],
        "weights_codebooks": weights[1],
        "counts": counts,
        "sums": sums,
    }
    for name, right in given.items():
        for wrong in (right[:-1], right.double()):
            grad, to_z, to_codebooks, *statistics = {**given, name: wrong}.values()
            with pytest.raises(RuntimeError, match=f"{name} has a wrong shape or type"):
                operators.codeword_search_train_backward(
                    grad, to_z, to_codebooks, z, indices, codebooks, *statistics, True
                )
