"""Every operation that the interpreter runs, by MIL's name.

To add an operation, add a function to the file of its group, with parameters that have MIL's names,
and a row to that file's ``OPS``.
"""

from __future__ import annotations

from typing import Final

from device_harness.coreml_interpreter.ops import (
    activation,
    constexpr,
    control_flow,
    convolution,
    elementwise,
    image,
    linear,
    normalization,
    quantization,
    recurrent,
    reduction,
    shape,
    slicing,
    state,
)
from device_harness.coreml_interpreter.ops.kinds import Operation

GROUPS: Final[dict[str, dict[str, Operation]]] = {
    "elementwise": elementwise.OPS,
    "activations": activation.OPS,
    "reductions and sorting": reduction.OPS,
    "shapes": shape.OPS,
    "slices, gathers, scatters": slicing.OPS,
    "convolutions and pools": convolution.OPS,
    "normalizations": normalization.OPS,
    "matrix products and attention": linear.OPS,
    "images": image.OPS,
    "recurrent layers": recurrent.OPS,
    "8-bit activations": quantization.OPS,
    "compressed weights": constexpr.OPS,
    "states": state.OPS,
    "control flow": control_flow.OPS,
}
OPS: Final[dict[str, Operation]] = {
    name: operation for group in GROUPS.values() for name, operation in group.items()
}
# Operations whose results may be views of an argument's memory; all others make new tensors.
VIEWS: Final = frozenset(
    {
        *("reshape", "reshape_like", "transpose", "expand_dims", "squeeze", "flatten2d"),
        *("identity", "split", "concat", "slice_by_index", "slice_by_size", "sliding_windows"),
        *("cast", "crop", "pad", "depth_to_space", "space_to_depth", "space_to_batch", "pow"),
        *("batch_to_space", "pixel_shuffle", "pixel_unshuffle", "gather", "gather_along_axis"),
        *("read_state", "coreml_update_state", "write_state", "cond", "while_loop", "tile"),
        *("conv_transpose", "reverse_sequence", "resize_nearest_neighbor", "gather_nd"),
        *("upsample_nearest_neighbor", "topk", "lstm", "round", "floor", "ceil", "reduce_prod"),
        *("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "cumsum"),
    }
)
# Operations whose results hold only elements of their arguments or exact numbers, so that rounding
# to float16 would change nothing.
EXACT: Final = frozenset(
    {
        *(shape.OPS.keys() - {"range_1d"}),
        *(slicing.OPS.keys() - {"scatter", "scatter_along_axis", "scatter_nd"}),
        *state.OPS,
        *control_flow.OPS,
        *("select", "relu", "abs", "maximum", "minimum", "reduce_max", "reduce_min", "max_pool"),
        *("sign", "crop", "resize_nearest_neighbor", "upsample_nearest_neighbor"),
    }
)
