"""What PyTorch expects of masked_attention3d: opcheck, fakes, compilation, export, transforms, autocast, backends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from attention import MASKS, STRIDED, inputs, native, operator, options, oracle, specification, strided_cases

import vpfast
from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode

GRID, MASK = (2, 3, 4), Mask3d("eq6", (1, None, 2))
POSITIONS = torch.tensor([23, 5, 5, 14])


def attention(q, k, v):
    return masked_attention3d(q, k, v, GRID, MASK)


def decode(q, k, v):
    return masked_attention3d_decode(q[:, :, POSITIONS], k, v, GRID, POSITIONS, MASK)


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_tensors_have_the_real_layout(dtype):
    for case in strided_cases().values():
        given = [tensor.to(dtype) for tensor in case]
        real = operator(*given, STRIDED, MASK)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = operator(*map(mode.from_tensor, given), STRIDED, MASK)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_gradients_that_there_are_not():
    q, k, v = (tensor.requires_grad_() for tensor in inputs(GRID, count=3))
    (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*vpfast.backend\(\"reference\"\)"):
        first.sum().backward()
    rules = options(q, GRID, MASK)
    _, lse = torch.ops.vpfast.masked_attention3d(q, k, v, *rules)
    assert not lse.requires_grad
    with pytest.raises(RuntimeError, match=r"decode is for inference .* under torch.no_grad\(\), or call masked_att"):
        decode(q, k, v)
    with pytest.raises(RuntimeError, match="decode is for inference"):
        torch.ops.vpfast.masked_attention3d_decode(q[:, :, POSITIONS], k, v, POSITIONS, *rules).sum().backward()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            torch.testing.assert_close(decode(q, k, v), attention(q, k, v)[:, :, POSITIONS])


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def layer(features, mask):
        """(B, 3 heads d, T, H, W) -> (B, heads, L, d), the grid read from the shape."""
        q, k, v = features.flatten(2).unflatten(1, (3, 2, -1)).mT.unbind(1)
        return masked_attention3d(q * 2, k, v, features.shape[2:], mask) + 1

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    for grid in ((2, 3, 4), (3, 4, 5), (5, 3, 7)):
        ours = torch.randn(6, 48, *grid, requires_grad=True)  # 6 is no size of a grid: they stay apart
        theirs = ours.detach().clone().requires_grad_()
        found, want = compiled(ours, MASK), layer(theirs, MASK)
        torch.testing.assert_close(found, want)
        found.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert counter.frame_count <= (1 if dynamic else 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_decode(dynamic):
    q, k, v = inputs(GRID, count=3)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(q, k, v, positions):
        return masked_attention3d_decode(q, k, v, GRID, positions, MASK) * 2

    for positions in (POSITIONS[:1], POSITIONS[1:3], POSITIONS):
        found = step(q[:, :, positions], k, v, positions)
        torch.testing.assert_close(found, 2 * attention(q, k, v)[:, :, positions])


def test_compile_by_inductor_and_through_backend_choice():
    @torch.compile(fullgraph=True)
    def both(q, k, v):
        with vpfast.backend("reference"):
            plain = attention(q, k, v)
        return attention(q, k, v), plain

    given = inputs(GRID, count=3)
    torch.testing.assert_close(both(*given), (attention(*given),) * 2)
    assert vpfast.current_backend() == "auto"


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Layer(torch.nn.Module):
        def forward(self, features):
            q = features.flatten(2).mT[:, None]
            return masked_attention3d(q, q, q, features.shape[2:], MASK)

    sizes = {0: torch.export.Dim("b"), 2: torch.export.Dim("t", max=64), 3: torch.export.Dim("h", max=64)}
    program = torch.export.export(Layer(), (torch.randn(2, 6, 2, 3, 4),), dynamic_shapes=(sizes,), strict=strict)
    assert "vpfast.masked_attention3d.default" in str(program.graph)
    features = torch.randn(3, 6, 4, 5, 4)
    torch.testing.assert_close(program.module()(features), Layer()(features))


# --- transforms and autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_forward_mode_and_function_transforms(choice):
    given = tuple(inputs(GRID, dtype=torch.float64, count=3))
    tangents = tuple(inputs(GRID, dtype=torch.float64, count=3, seed=1))
    wanted, want = torch.func.jvp(lambda q, k, v: oracle(q, k, v, GRID, MASK)[0].nan_to_num(), given, tangents)
    with vpfast.backend(choice):
        value, found = torch.func.jvp(attention, given, tangents)
        batched = torch.func.vmap(attention)(*(tensor[:, None] for tensor in given))
        gradients = torch.func.grad(lambda *given: (attention(*given) * wanted).sum(), (0, 1, 2))(*given)
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            dual_found = torch.autograd.forward_ad.unpack_dual(attention(*dual)).tangent
        decoded = torch.func.vmap(decode)(*(tensor[:, None] for tensor in given))
        some = torch.arange(24).unflatten(0, (4, 6))  # positions of its own for each of a batch of queries
        each = torch.func.vmap(lambda p: masked_attention3d_decode(given[0][:, :, p], *given[1:], GRID, p, MASK))(some)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(found, want.nan_to_num())
    torch.testing.assert_close(dual_found, want.nan_to_num())
    torch.testing.assert_close(batched[:, 0], wanted)
    torch.testing.assert_close(decoded[:, 0], wanted[:, :, POSITIONS])
    torch.testing.assert_close(torch.cat(each.unbind(), 2), wanted)
    torch.testing.assert_close(gradients, specification(*given, wanted, GRID, MASK)[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_autocast_is_that_of_torchs_own_attention(choice, dtype):
    q, k, v = inputs(GRID, count=3)
    cast = [tensor.to(dtype) for tensor in (q, k, v)]
    leaves = [tensor.clone().requires_grad_() for tensor in cast]
    want = attention(*leaves)
    want.square().sum().backward()
    ours = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    with vpfast.backend(choice), torch.autocast("cpu", dtype):
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == dtype
        found = attention(*ours)
        torch.testing.assert_close(decode(q, cast[1], v.half()), want[:, :, POSITIONS], rtol=0.02, atol=0.02)
        mixed = attention(q, k.bfloat16().to(dtype), v)
        doubles = attention(q.double(), k.double(), v.double())
        found.square().sum().backward()  # inside, where the gradient's own products must not be cast either
    assert {found.dtype, mixed.dtype} == {dtype}
    assert doubles.dtype == torch.float64
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, want, rtol=2 * eps, atol=2 * eps)
    for tensor, leaf in zip(ours, leaves, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, leaf.grad.float(), rtol=8 * eps, atol=8 * eps)


@native
def test_raw_operators_under_autocast():
    q, k, v = inputs(GRID, count=3)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = torch.ops.vpfast.masked_attention3d(q, k, v, *options(q, GRID, MASK))
        decoded = torch.ops.vpfast.masked_attention3d_decode(q, k, v, torch.arange(24), *options(q, GRID, MASK))
    assert (out.dtype, lse.dtype, decoded.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


# --- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS[::3], ids=str)
def test_reference_backend_gives_the_same(mask):
    given = [tensor.requires_grad_() for tensor in inputs((3, 3, 5), 7, dtype=torch.float64, count=3)]
    out = masked_attention3d(*given, (3, 3, 5), mask)
    gradients = torch.autograd.grad(out.square().sum(), given)
    with vpfast.backend("reference"):
        plain = masked_attention3d(*given, (3, 3, 5), mask)
        torch.testing.assert_close(plain, out)
        torch.testing.assert_close(torch.autograd.grad(plain.square().sum(), given), gradients)
        with torch.no_grad():
            rows = masked_attention3d_decode(given[0][:, :, POSITIONS], *given[1:], (3, 3, 5), POSITIONS, mask)
            torch.testing.assert_close(rows, out[:, :, POSITIONS])


def test_reference_backend_is_twice_differentiable():
    given = [tensor.requires_grad_() for tensor in inputs((2, 2, 2), 3, 1, 1, torch.float64, count=3)]
    with vpfast.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda q, k, v: masked_attention3d(q, k, v, (2, 2, 2), Mask3d("separable")), given
        )


@native
def test_without_compiled_kernels_the_same_ladder_holds():
    """The operators are served by the reference then; this process has the kernels, so another one climbs."""
    rungs = (
        "every_mask and eq6 or sees_nothing or scale_0 or not_seen or strides or empty or anywhere or memory and raster"
    )
    ladder = str(Path(__file__).with_name("test_masked_attention3d.py"))
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", rungs, ladder]
    code = f"import sys; sys.modules['vpfast._C'] = None; import pytest; sys.exit(pytest.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "needs the compiled" in done.stdout


def test_refused_backend_says_why():
    q, k, v = (tensor.to("meta") for tensor in inputs(GRID, count=3))
    refused = r"vpfast.ops.masked_attention3d has no backend for this meta tensor .*"
    with pytest.raises(vpfast.ops._backend.BackendError, match=refused + "native: .*; triton: "):
        attention(q, k, v)
    with vpfast.backend("triton"), pytest.raises(vpfast.ops._backend.BackendError, match=refused + "triton: Triton"):
        masked_attention3d_decode(q[:, :, :4], k, v, GRID, POSITIONS.to("meta"), MASK)
