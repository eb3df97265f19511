"""How a matrix's input activations are rounded, by the name that a recipe uses.

A weight's integer format says nothing about the activations that it multiplies. A runtime whose
kernel multiplies 8-bit integers rounds the activations too. A plan that promises this rounding puts
it into the quantized program as operators of `quant.program.ops`, so that the reference QUANTIZED
computes what the plan promises.
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
    NONE: "the plan promises no rounding; if a runtime's kernel rounds, that is lowering error",
    TOKEN: "8 bits with a scale and a zero point for each token, found while the model runs",
    TENSOR: "8 bits with one scale for all tokens, found on the calibration text",
}

INPUT_SCALE: Final = "input_scale"
"""The name of the stored part that holds the scale of a weight's inputs."""
INPUT_SCALE_LAYOUT: Final = TensorLayout("bfloat16", (1, 1))


def parse_activation(name: str) -> Activation:
    """Checks the name of a rounding of activations and returns it.

    Raises:
        QuantizationError: no rounding of activations has this name.
    """
    if name not in ACTIVATIONS:
        hint = did_you_mean(name, ACTIVATIONS)
        raise QuantizationError(
            f"there is no activation {name!r}{hint}; known: {', '.join(ACTIVATIONS)}"
        )
    return name
