"""What happens to the activations that enter a matrix, by the name that a recipe gives it.

Weights in integers say nothing of what they are multiplied by. A runtime whose kernel multiplies
8-bit integers rounds that too; a plan that promises it has the rounding in the quantized program,
as operators of `quant.program.ops`, so that QUANTIZED computes what was promised.
"""

from __future__ import annotations

from typing import Final, Literal

from quant.errors import QuantizationError
from quant.formats.formats import TensorLayout
from quant.suggestion import did_you_mean

Activation = Literal["none", "int8-token", "int8-tensor"]

NONE: Final = "none"
TOKEN: Final = "int8-token"
TENSOR: Final = "int8-tensor"

ACTIVATIONS: Final[dict[Activation, str]] = {
    NONE: "the plan promises no rounding; what a runtime's kernel does is its lowering error",
    TOKEN: "8 bits with a scale and a zero point for each token, found as it runs",
    TENSOR: "8 bits with one scale for all tokens, found on the calibration text",
}

INPUT_SCALE: Final = "input_scale"
"""The part of a stored weight that is the scale of what enters it."""
INPUT_SCALE_LAYOUT: Final = TensorLayout("bfloat16", (1, 1))


def parse_activation(name: str) -> Activation:
    """A treatment of activations by its name.

    Raises:
        QuantizationError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        hint = did_you_mean(name, ACTIVATIONS)
        raise QuantizationError(
            f"there is no activation {name!r}{hint}; known: {', '.join(ACTIVATIONS)}"
        )
    return name
