"""Operations of MIL as methods that know what they give."""

from __future__ import annotations

from collections.abc import Sequence

from exporters.coreml.function import FunctionBuilder, Shape, Value


class Emitter(FunctionBuilder):
    """A function under construction; every method emits one operation and gives its result."""

    def binary(self, kind: str, name: str, x: Value, y: Value | float | int) -> Value:
        """``add``, ``sub``, ``mul``, ``real_div``, ``maximum`` or a comparison, broadcast."""
        if not isinstance(y, Value):
            y = self.constant(y, x.dtype)
        compares = kind in ("less_equal", "greater", "equal")
        dtype = "bool" if compares else x.dtype
        return self.call(kind, name, dtype, broadcast(x.shape, y.shape), x=x, y=y)

    def unary(self, kind: str, name: str, x: Value) -> Value:
        """``silu``, ``abs``, ``square``: element by element."""
        return self.call(kind, name, x.dtype, x.shape, x=x)

    def cast(self, name: str, x: Value, dtype: str) -> Value:
        """Another dtype; the value itself where it has it already."""
        return x if x.dtype == dtype else self.call("cast", name, dtype, x.shape, x=x, dtype=dtype)

    def cast_once(self, name: str, x: Value, dtype: str) -> Value:
        """Another dtype of a constant that is used often."""
        key = "cast", name
        if key not in self._constants:
            self._constants[key] = self.cast(name, x, dtype)
        return self._constants[key]

    def round_to_bytes(self, name: str, x: Value, scale: Value) -> Value:
        """Rounded to signed 8-bit integers, and back; what Core ML multiplies integers by."""
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
        """Another shape; one size may depend on the number of tokens."""
        if shape == x.shape:
            return x
        return self.call("reshape", name, x.dtype, shape, x=x, shape=list(shape))

    def heads_first(self, name: str, x: Value) -> Value:
        """``[1, t, heads, width]`` as ``[1, heads, t, width]``, and back."""
        first, t, heads, width = x.shape
        shape = (first, heads, t, width)
        if 1 in (t, heads):  # nothing moves
            return self.reshape(name, x, shape)
        return self.call("transpose", name, x.dtype, shape, x=x, perm=[0, 2, 1, 3])

    def concat(self, name: str, values: Sequence[Value], axis: int) -> Value:
        """Side by side along an axis."""
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.call(
            "concat",
            name,
            values[0].dtype,
            tuple(shape),
            values=list(values),
            axis=axis,
            interleave=False,
        )

    def split(self, names: Sequence[str], x: Value, sizes: Sequence[int]) -> list[Value]:
        """Pieces along the last axis."""
        results = [
            (name, x.dtype, (*x.shape[:-1], size)) for name, size in zip(names, sizes, strict=True)
        ]
        return self.call_many("split", results, x=x, split_sizes=list(sizes), axis=-1)

    def reduce(self, kind: str, name: str, x: Value) -> Value:
        """``reduce_mean``, ``reduce_max``: over the last axis, which stays."""
        shape = (*x.shape[:-1], 1)
        return self.call(kind, name, x.dtype, shape, x=x, axes=[-1], keep_dims=True)

    def rsqrt(self, name: str, x: Value, epsilon: float) -> Value:
        """``1 / sqrt(x + epsilon)``."""
        small = self.constant(epsilon, x.dtype)
        return self.call("rsqrt", name, x.dtype, x.shape, x=x, epsilon=small)

    def gather_rows(self, name: str, table: Value, rows: Value) -> Value:
        """Rows of a matrix, or numbers of a list: ``[n, ...], int32[a, ...] -> [a, ..., ...]``."""
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
        """Matrix product over the last two axes."""
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
        """Over the last axis."""
        return self.call("softmax", name, x.dtype, x.shape, x=x, axis=-1)

    def numbers(self, name: str, count: int | Value) -> Value:
        """``0, 1, ...``: ``int32[count]``."""
        size = count if isinstance(count, int) else -1
        return self.call("range_1d", name, "int32", (size,), start=0, end=count, step=1)

    def last_position(self, name: str, x: Value) -> Value:
        """``[1, t, width]`` to ``[1, 1, width]``."""
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

    def pad_last(self, name: str, x: Value, width: int) -> Value:
        """Zeros after the last axis, up to a width."""
        more = width - x.shape[-1]
        if not more:
            return x
        return self.call(
            "pad",
            name,
            x.dtype,
            (*x.shape[:-1], width),
            x=x,
            pad=[0] * (2 * len(x.shape) - 1) + [more],
            mode="constant",
            constant_val=self.constant(0.0, x.dtype),
        )

    def first_columns(self, name: str, x: Value, width: int) -> Value:
        """The first columns of the last axis; all of them when it has no more."""
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
    """The shape of an operation on two; a size of 1 gives way, also to -1.

    >>> broadcast((1, -1, 4), (8, 1, 1))
    (8, -1, 4)
    """
    rank = max(len(x), len(y))
    x, y = (1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y
    assert all(a == b or 1 in (a, b) for a, b in zip(x, y, strict=True)), f"{x} meets {y}"
    return tuple(b if a == 1 else a for a, b in zip(x, y, strict=True))
