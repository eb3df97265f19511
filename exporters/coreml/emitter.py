"""MIL operations as methods that compute the dtype and shape of their result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from exporters.coreml.function import FunctionBuilder, Shape, Value

_COMPARISONS: Final = frozenset(
    {"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"}
)


class Emitter(FunctionBuilder):
    """A function under construction; a method emits an operation and returns its result."""

    def binary(self, kind: str, name: str, x: Value, y: Value | float | int) -> Value:
        """An operation of two operands, such as ``add`` or a comparison; it broadcasts."""
        if not isinstance(y, Value):
            y = self.constant(y, x.dtype)
        compares = kind in _COMPARISONS
        dtype = "bool" if compares else x.dtype
        return self.call(kind, name, dtype, broadcast(x.shape, y.shape), x=x, y=y)

    def unary(self, kind: str, name: str, x: Value) -> Value:
        """``silu``, ``sigmoid``, ``tanh``, ``abs`` or ``identity``, element by element."""
        return self.call(kind, name, x.dtype, x.shape, x=x)

    def cast(self, name: str, x: Value, dtype: str) -> Value:
        """Casts to a dtype; returns the value itself when it has that dtype."""
        return x if x.dtype == dtype else self.call("cast", name, dtype, x.shape, x=x, dtype=dtype)

    def cast_once(self, name: str, x: Value, dtype: str) -> Value:
        """Casts to a dtype, once for all uses of a value; itself when it has that dtype."""
        return self.once(("cast", name), lambda: self.cast(name, x, dtype))

    def round_to_bytes(self, name: str, x: Value, scale: Value) -> Value:
        """Quantizes to signed 8-bit integers by a scale and dequantizes again.

        Core ML multiplies integer weights by activations in this form.
        """
        codes = self.call(
            "quantize",
            f"{name}_codes",
            "int8",
            x.shape,
            input=x,
            scale=scale,
            output_dtype="int8",
        )
        return self.call("dequantize", name, x.dtype, x.shape, input=codes, scale=scale)

    def reshape(self, name: str, x: Value, shape: Shape) -> Value:
        """Reshapes; one size may depend on the number of tokens (-1)."""
        if shape == x.shape:
            return x
        return self.call("reshape", name, x.dtype, shape, x=x, shape=list(shape))

    def heads_first(self, name: str, x: Value) -> Value:
        """Turns ``[1, t, heads, width]`` into ``[1, heads, t, width]``, or back."""
        first, t, heads, width = x.shape
        shape = (first, heads, t, width)
        if 1 in (t, heads):  # the order in memory stays the same
            return self.reshape(name, x, shape)
        return self.call("transpose", name, x.dtype, shape, x=x, perm=[0, 2, 1, 3])

    def concat(self, name: str, values: Sequence[Value], axis: int) -> Value:
        """Concatenates values along an axis."""
        shape = list(values[0].shape)
        sizes = [value.shape[axis] for value in values]
        shape[axis] = -1 if -1 in sizes else sum(sizes)
        return self.call(
            "concat",
            name,
            values[0].dtype,
            tuple(shape),
            values=list(values),
            axis=axis,
            interleave=False,
        )

    def split(
        self, names: Sequence[str], x: Value, sizes: Sequence[int], axis: int = -1
    ) -> list[Value]:
        """Splits along an axis, the last or the first, into pieces of these sizes."""
        results = [
            (name, x.dtype, (*x.shape[:-1], size) if axis else (size, *x.shape[1:]))
            for name, size in zip(names, sizes, strict=True)
        ]
        return self.call_many("split", results, x=x, split_sizes=list(sizes), axis=axis)

    def gelu(self, name: str, x: Value, mode: str) -> Value:
        """The Gaussian error linear unit, ``EXACT`` or by the ``TANH_APPROXIMATION``."""
        return self.call("gelu", name, x.dtype, x.shape, x=x, mode=mode)

    def clip(self, name: str, x: Value, limit: float) -> Value:
        """Keeps values within ``-limit`` and ``limit``."""
        low, high = (self.constant(bound, x.dtype) for bound in (-limit, limit))
        return self.call("clip", name, x.dtype, x.shape, x=x, alpha=low, beta=high)

    def select(self, name: str, condition: Value, x: Value, otherwise: Value | float) -> Value:
        """``x`` where a condition holds, another value or one number elsewhere.

        The condition broadcasts to the shape that both values broadcast to.
        """
        b = otherwise if isinstance(otherwise, Value) else self.constant(otherwise, x.dtype)
        shape = broadcast(x.shape, b.shape)
        return self.call("select", name, x.dtype, shape, cond=condition, a=x, b=b)

    def replace(self, name: str, x: Value, condition: Value, number: float) -> Value:
        """One number where a condition that broadcasts to ``x`` holds, ``x`` elsewhere."""
        a = self.constant(number, x.dtype)
        return self.call("select", name, x.dtype, x.shape, cond=condition, a=a, b=x)

    def reduce(self, kind: str, name: str, x: Value) -> Value:
        """``reduce_mean`` or another reduction over the last axis, which stays with size 1."""
        shape = (*x.shape[:-1], 1)
        return self.call(kind, name, x.dtype, shape, x=x, axes=[-1], keep_dims=True)

    def reduce_tokens(self, kind: str, name: str, x: Value) -> Value:
        """A reduction over all axes but the last, ``[1, t, width]`` to ``[width]``."""
        return self.call(kind, name, x.dtype, x.shape[-1:], x=x, axes=[0, 1], keep_dims=False)

    def sum_over(self, name: str, x: Value, axis: int) -> Value:
        """The sum of the elements along an axis, which goes."""
        place = axis % len(x.shape)
        shape = (*x.shape[:place], *x.shape[place + 1 :])
        return self.call("reduce_sum", name, x.dtype, shape, x=x, axes=[axis], keep_dims=False)

    def largest(self, name: str, x: Value, count: int) -> Value:
        """The largest elements of the last axis; their order is not relied upon."""
        return self.call(
            "topk",
            name,
            x.dtype,
            (*x.shape[:-1], count),
            x=x,
            k=count,
            axis=-1,
            ascending=False,
            sort=True,
            return_indices=False,
        )

    def running_sum(
        self,
        name: str,
        x: Value,
        axis: int = -1,
        *,
        exclusive: bool = False,
        reverse: bool = False,
    ) -> Value:
        """The sum of each element along an axis and all before it.

        Args:
            name: the result's name.
            x: what is added up.
            axis: the axis.
            exclusive: whether the element itself is left out.
            reverse: whether all behind it are added in place of those before it.
        """
        place = axis if axis == -1 else axis % len(x.shape)  # MIL knows no other negative one
        return self.call(
            "cumsum", name, x.dtype, x.shape, x=x, axis=place, exclusive=exclusive, reverse=reverse
        )

    def zeros(self, name: str, like: Value, dtype: str) -> Value:
        """Zeros in another value's shape."""
        zero = self.constant(0.0, dtype)
        return self.call("fill_like", name, dtype, like.shape, ref_tensor=like, value=zero)

    def rsqrt(self, name: str, x: Value, epsilon: float) -> Value:
        """``1 / sqrt(x + epsilon)``."""
        small = self.constant(epsilon, x.dtype)
        return self.call("rsqrt", name, x.dtype, x.shape, x=x, epsilon=small)

    def gather_rows(self, name: str, table: Value, rows: Value) -> Value:
        """Gathers along the first axis: ``[n, ...], int32[a, ...] -> [a, ..., ...]``."""
        shape = (*rows.shape, *table.shape[1:])
        return self.call(
            "gather",
            name,
            table.dtype,
            shape,
            x=table,
            indices=rows,
            axis=0,
            batch_dims=0,
            validate_indices=False,
        )

    def linear(self, name: str, x: Value, weight: Value, bias: Value) -> Value:
        """``x @ weight.T + bias``."""
        shape = (*x.shape[:-1], weight.shape[0])
        return self.call("linear", name, x.dtype, shape, x=x, weight=weight, bias=bias)

    def matmul(
        self, name: str, x: Value, y: Value, *, transpose_x: bool = False, transpose_y: bool = False
    ) -> Value:
        """The matrix product over the last two axes."""
        rows = x.shape[-1] if transpose_x else x.shape[-2]
        columns = y.shape[-2] if transpose_y else y.shape[-1]
        shape = (*broadcast(x.shape[:-2], y.shape[:-2]), rows, columns)
        return self.call(
            "matmul",
            name,
            x.dtype,
            shape,
            x=x,
            y=y,
            transpose_x=transpose_x,
            transpose_y=transpose_y,
        )

    def softmax(self, name: str, x: Value) -> Value:
        """The softmax over the last axis."""
        return self.call("softmax", name, x.dtype, x.shape, x=x, axis=-1)

    def numbers(self, name: str, count: int | Value) -> Value:
        """``0, 1, ...``: ``int32[count]``."""
        size = count if isinstance(count, int) else -1
        return self.call("range_1d", name, "int32", (size,), start=0, end=count, step=1)

    def last_position(self, name: str, x: Value) -> Value:
        """Selects the last position: ``[1, t, width]`` to ``[1, 1, width]``."""
        free = [True, False, True]
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            (x.shape[0], 1, x.shape[2]),
            x=x,
            begin=[0, -1, 0],
            end=[0, 0, 0],
            begin_mask=free,
            end_mask=[True, True, True],
        )

    def token_rows(self, name: str, x: Value, begin: int, count: int, behind: int) -> Value:
        """Selects rows of the second of three axes.

        Args:
            name: the result's name.
            x: ``[1, n, width]``; n may depend on the number of tokens.
            begin: how many rows are before them; counted from the end where negative.
            count: how many rows they are; -1 where that depends on the number of tokens.
            behind: how many rows are behind them.
        """
        # coremltools' reader changes constants that count from the end, so that two operations
        # cannot share one: where n is known, rows are counted from the beginning.
        first, end = begin, -behind
        if x.shape[1] != -1:
            first, end = begin % x.shape[1], x.shape[1] - behind
        free = [True, False, True]
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            (x.shape[0], count, x.shape[2]),
            x=x,
            begin=[0, first, 0],
            end=[0, end, 0],
            begin_mask=free,
            end_mask=free if end else [True] * 3,
        )

    def pad_last(self, name: str, x: Value, width: int) -> Value:
        """Pads the last axis with zeros at its end, up to a width."""
        return self.pad_to(name, x, (*x.shape[:-1], width))

    def pad_to(self, name: str, x: Value, shape: Shape) -> Value:
        """Pads axes with zeros at their ends, up to a shape."""
        if shape == x.shape:
            return x
        more = [(0, new - old) for new, old in zip(shape, x.shape, strict=True)]
        return self.call(
            "pad",
            name,
            x.dtype,
            shape,
            x=x,
            pad=[size for pair in more for size in pair],
            mode="constant",
            constant_val=self.constant(0.0, x.dtype),
        )

    def leading(self, name: str, x: Value, shape: Shape) -> Value:
        """Selects the first elements along each axis, as many as a shape says."""
        if shape == x.shape:
            return x
        rank = len(shape)
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            shape,
            x=x,
            begin=[0] * rank,
            end=list(shape),
            begin_mask=[True] * rank,
            end_mask=[False] * rank,
        )

    def tile(self, name: str, x: Value, times: Sequence[int]) -> Value:
        """Repeats a value along each axis as often as is said for it."""
        sizes = zip(x.shape, times, strict=True)
        shape = tuple(-1 if size == -1 else size * each for size, each in sizes)
        return self.call("tile", name, x.dtype, shape, x=x, reps=list(times))

    def column(self, name: str, x: Value, index: int) -> Value:
        """Selects one column of the last axis, ``[..., width]`` to ``[..., 1]``."""
        others = len(x.shape) - 1
        free = [True] * others + [False]
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            (*x.shape[:-1], 1),
            x=x,
            begin=[0] * others + [index],
            end=[0] * others + [index + 1],
            begin_mask=free,
            end_mask=free,
        )

    def element(self, name: str, x: Value, index: int) -> Value:
        """Selects one element of a vector, as a scalar."""
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            (),
            x=x,
            begin=[index],
            end=[index + 1],
            squeeze_mask=[True],
        )

    def first_columns(self, name: str, x: Value, width: int) -> Value:
        """Selects the first ``width`` columns of the last axis."""
        if x.shape[-1] == width:
            return x
        zeros, rank = [0] * len(x.shape), len(x.shape)
        return self.call(
            "slice_by_index",
            name,
            x.dtype,
            (*x.shape[:-1], width),
            x=x,
            begin=zeros,
            end=[*zeros[1:], width],
            begin_mask=[True] * rank,
            end_mask=[True] * (rank - 1) + [False],
        )


def broadcast(x: Shape, y: Shape) -> Shape:
    """The shape of an operation that broadcasts two shapes; a size of 1 also broadcasts to -1.

    >>> broadcast((1, -1, 4), (8, 1, 1))
    (8, -1, 4)
    """
    rank = max(len(x), len(y))
    x, y = (1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y
    assert all(a == b or 1 in (a, b) for a, b in zip(x, y, strict=True)), f"{x} meets {y}"
    return tuple(b if a == 1 else a for a, b in zip(x, y, strict=True))
