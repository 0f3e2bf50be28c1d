"""Triton's interpreter, mended where it does otherwise than a GPU."""

import functools

import torch


@functools.cache
def mend():
    """Triton 3.6 makes a loop's bounds of arrays of one number by ``int``, which NumPy 2.4 refuses; it multiplies
    matrices of bfloat16 as if their bits were integers, and rounds to bfloat16 towards zero. Its products of matrices
    are NumPy's, where an element's order of summation is a matter of the processor and of the element's place: equal
    rows can give unequal products, and scores taken twice can differ. On a GPU they do not."""
    from triton.runtime import interpreter

    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    patch, cast = interpreter._patch_lang_tensor, builder.cast_impl

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot_term_by_term(self, a, b, total, *precision):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar.is_bf16() else x for x in (a, b))
        columns, rows = a.data.T.astype(total.data.dtype), b.data.astype(total.data.dtype)
        terms = (column[:, None] * row for column, row in zip(columns, rows, strict=True))
        return interpreter.TensorHandle(sum(terms, total.data), total.dtype.scalar)

    def cast_to_nearest(self, source, to):
        if not (source.dtype.scalar.is_fp32() and to.scalar.is_bf16()):
            return cast(self, source, to)
        rounded = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, to.scalar)

    interpreter._patch_lang_tensor = patch_and_mend
    builder.create_dot, builder.cast_impl = dot_term_by_term, cast_to_nearest
