"""What a program may consist of, before and after quantization. Both checks always run."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from quant.errors import QuantizationError
from quant.formats.activations import INPUT_SCALE
from quant.formats.formats import PaletteFormat
from quant.program.ops import quantized_format  # and with it torch.ops.edgeforge
from quant.program.program import Program, shape_of

_edgeforge = torch.ops.edgeforge
_aten = torch.ops.aten

EMBEDDING = _edgeforge.embedding.default
LINEAR = _edgeforge.linear.default
RMS_NORM = _edgeforge.rms_norm.default
ROPE = _edgeforge.rope.default
ATTENTION = _edgeforge.attention.default
QUANT_LINEAR = _edgeforge.quant_linear.default
QUANT_EMBEDDING = _edgeforge.quant_embedding.default
ROUND_PER_TOKEN = _edgeforge.round_per_token.default
ROUND_PER_TENSOR = _edgeforge.round_per_tensor.default
ADD = _aten.add.Tensor
MUL = _aten.mul.Tensor
SILU = _aten.silu.default
VIEW = _aten.view.default
SPLIT = _aten.split_with_sizes.default
SIZE = _aten.sym_size.int
LAST = _aten.slice.Tensor
GET = operator.getitem

FLOAT_DIALECT: frozenset[Callable[..., object]] = frozenset(
    {EMBEDDING, LINEAR, RMS_NORM, ROPE, ATTENTION, ADD, MUL, SILU, VIEW, SPLIT, SIZE, GET}
)
# What stands between an activation and the product that it is rounded for.
ROUNDINGS: frozenset[Callable[..., object]] = frozenset({ROUND_PER_TOKEN, ROUND_PER_TENSOR})
QUANTIZED_DIALECT = FLOAT_DIALECT | ROUNDINGS | {QUANT_LINEAR, QUANT_EMBEDDING}

# Inserted by `exporters.last_token`, for artifacts that give only the last token's logits.
LOWERED_DIALECT = QUANTIZED_DIALECT | {LAST}

# Each output row depends on the same row of the inputs alone: position by position.
POINTWISE = ROUNDINGS | {
    *(EMBEDDING, LINEAR, RMS_NORM, ADD, MUL, SILU, QUANT_LINEAR, QUANT_EMBEDDING, SPLIT, GET)
}


class DialectError(QuantizationError):
    """A program holds something that no exporter knows."""


def check_float(program: Program) -> None:
    """Checks a program as traced.

    Raises:
        DialectError: a call outside the float dialect, one with keyword arguments (exporters
            read arguments by place), an input without a meaning, or an output that is no logits.
    """
    _check(program, FLOAT_DIALECT, "float")


def check_quantized(program: Program) -> None:
    """Checks a program after the rewrite; arguments as `check_float`."""
    _check(program, QUANTIZED_DIALECT, "quantized")
    _check_operands(program)


def check_lowered(program: Program) -> None:
    """Checks a program that `exporters.last_token` changed; arguments as `check_float`."""
    _check(program, LOWERED_DIALECT, "lowered")
    _check_operands(program)
    shape = shape_of(program.output())
    if shape[1] != 1:
        raise DialectError(f"the lowered program returns shape {shape}, not one position's logits")


def _check_operands(program: Program) -> None:
    """Quantized operators read the parts of a weight that their format has."""
    for node in program.graph.nodes:
        if node.target in (QUANT_LINEAR, QUANT_EMBEDDING):
            for index, part in enumerate(_parts(node), start=1):
                source = node.args[index]
                if source is None and index == 3:
                    continue
                if part is None:
                    raise DialectError(f"{node.name}: argument 3 must be None for a palette")
                given = program.inputs.get(source.name) if isinstance(source, fx.Node) else None
                if given is None or given.kind != "weight" or given.part != part:
                    raise DialectError(f"{node.name}: argument {index} is not a weight's {part}")
        if node.target in ROUNDINGS:
            _check_rounding(program, node)


def _check_rounding(program: Program, node: fx.Node) -> None:
    """An activation is rounded for products with integers alone, by a scale of the store's."""
    if any(user.target not in (QUANT_LINEAR, LAST) for user in node.users):
        raise DialectError(f"{node.name} rounds what others than products with integers read")
    if node.target is ROUND_PER_TENSOR:
        source = node.args[1]
        given = program.inputs.get(source.name) if isinstance(source, fx.Node) else None
        if given is None or given.kind != "weight" or given.part != INPUT_SCALE:
            raise DialectError(f"{node.name}: argument 1 is not the scale of a weight's inputs")


def _parts(node: fx.Node) -> tuple[str, str, str | None]:
    """The parts that a quantized operator takes, in order; a third one may be left out."""
    if isinstance(quantized_format(str(node.args[4])), PaletteFormat):
        return "codes", "lut", None
    return "codes", "scale", "zero_point"


def _check(program: Program, dialect: frozenset[Callable[..., object]], label: str) -> None:
    for node in program.graph.nodes:
        match node.op:
            case "placeholder":
                if node.name not in program.inputs:
                    raise DialectError(f"the {label} program has an unnamed input {node.name}")
            case "call_function":
                if node.target not in dialect:
                    raise DialectError(
                        f"the {label} program calls {node.target} at {node.name}, which is not in "
                        f"its dialect: write the family with edgeforge:: operators"
                    )
                if node.kwargs:
                    raise DialectError(
                        f"the {label} program gives {node.name} the keyword "
                        f"{', '.join(node.kwargs)}, which exporters would not see: give it by place"
                    )
            case "output":
                pass
            case _:
                raise DialectError(f"the {label} program has a {node.op} node at {node.name}")
    shape = shape_of(program.output())
    if len(shape) != 3 or shape[0] != 1 or shape[2] != program.vocab_size:
        raise DialectError(
            f"the {label} program returns shape {shape}, not logits [1, t, {program.vocab_size}]"
        )
