"""The kinds of operations that EdgeForge writes into a package, and those that may be float32."""

from __future__ import annotations

from typing import Final

from exporters.coreml.numbers import NUMBERS

# What stays float32 where all else is float16: norms, rotary tables, the scale of scores, softcaps,
# residual streams that float16 cannot hold, the choice of experts and the sum of their results,
# recurrences, and weights that are float32 themselves.
MAY_BE_FLOAT32: Final = frozenset(
    {
        *("const", "cast", "gather", "slice_by_index", "add", "sub", "mul", "real_div", "tanh"),
        *("reduce_mean", "reduce_max", "rsqrt"),
        *("topk", "cumsum", "reduce_min", "reduce_sum", "abs", "maximum", "select"),
        *("cond", "identity", "fill_like", "tile"),
        *("reshape", "transpose", "exp", "softplus", "sigmoid"),
    }
)
EMITTED: Final = frozenset(
    {
        *NUMBERS,
        "const",
        "constexpr_blockwise_shift_scale",
        "constexpr_affine_dequantize",
        "constexpr_lut_to_dense",
        "concat",
        "shape",
        "linear",
        "matmul",
        "softmax",
        "scaled_dot_product_attention",
        "silu",
        "gelu",
        "tanh",
        "relu",
        "exp",
        "softplus",
        "clip",
        "select",
        "abs",
        "maximum",
        "sigmoid",
        "topk",
        "cumsum",
        "reduce_min",
        "less",
        "not_equal",
        "logical_or",
        "logical_not",
        "fill_like",
        "identity",
        "cond",
        "real_div",
        "reduce_mean",
        "reduce_max",
        "rsqrt",
        "split",
        "transpose",
        "pad",
        "slice_by_index",
        "slice_update",
        "read_state",
        "write_state",
        "quantize",
        "dequantize",
    }
)
