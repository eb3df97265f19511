"""The operators that a program may call before and after quantization, and the checks of both.

Every export runs both checks, so that exporters may rely on what they guarantee.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from quant.errors import QuantizationError
from quant.formats.activations import INPUT_SCALE
from quant.formats.formats import PaletteFormat
from quant.program import (  # noqa: F401  they define torch.ops.edgeforge
    expert_ops,
    recurrence_ops,
    state_ops,
    token_ops,
)
from quant.program.ops import quantized_format
from quant.program.program import Program, shape_of

_edgeforge = torch.ops.edgeforge
_aten = torch.ops.aten

EMBEDDING = _edgeforge.embedding.default
LINEAR = _edgeforge.linear.default
RMS_NORM = _edgeforge.rms_norm.default
ROPE = _edgeforge.rope.default
ATTENTION = _edgeforge.attention.default
SHORT_CONV = _edgeforge.short_conv.default
RECURRENCE = _edgeforge.recurrence.default
TOKEN_SHIFT = _edgeforge.token_shift.default
BIAS = _edgeforge.bias.default
LAYER_NORM = _edgeforge.layer_norm.default
GELU = _edgeforge.gelu.default
SCALE = _edgeforge.scale.default
SOFTCAP = _edgeforge.softcap.default
CLAMP = _edgeforge.clamp.default
GAIN = _edgeforge.gain.default
L2_NORM = _edgeforge.l2_norm.default
ROUTE = _edgeforge.route.default
ROUTE_SPARSE_MIXER = _edgeforge.route_sparse_mixer.default
CHOSEN = _edgeforge.chosen_tokens.default
COMBINE = _edgeforge.combine.default
CHOSEN_SLOTS = _edgeforge.chosen_slots.default
SLOTS = _edgeforge.slots.default
QUANT_LINEAR = _edgeforge.quant_linear.default
QUANT_EMBEDDING = _edgeforge.quant_embedding.default
ROUND_PER_TOKEN = _edgeforge.round_per_token.default
ROUND_PER_TENSOR = _edgeforge.round_per_tensor.default
ADD = _aten.add.Tensor
MUL = _aten.mul.Tensor
SILU = _aten.silu.default
SIGMOID = _aten.sigmoid.default
TANH = _aten.tanh.default
RELU = _aten.relu.default
EXP = _aten.exp.default
SOFTPLUS = _aten.softplus.default
VIEW = _aten.view.default
SPLIT = _aten.split_with_sizes.default
SIZE = _aten.sym_size.int
LAST = _aten.slice.Tensor
GET = operator.getitem

# What carries a state from call to call (`quant.program.states`).
STATEFUL: frozenset[Callable[..., object]] = frozenset(
    {ATTENTION, SHORT_CONV, RECURRENCE, TOKEN_SHIFT}
)
# What works token by token with one operand, and is no product and no norm.
ELEMENTWISE: frozenset[Callable[..., object]] = frozenset(
    {BIAS, GAIN, SILU, SIGMOID, TANH, RELU, EXP, SOFTPLUS, GELU, SCALE, SOFTCAP, CLAMP}
)
# What gives each token its weights of a mixture's experts.
ROUTES: frozenset[Callable[..., object]] = frozenset({ROUTE, ROUTE_SPARSE_MIXER})
# What begins the branch of an expert, and what gathers the branches' results.
BRANCHING: frozenset[Callable[..., object]] = frozenset({CHOSEN, CHOSEN_SLOTS})
GATHERING: frozenset[Callable[..., object]] = frozenset({COMBINE, SLOTS})
# A mixture of experts (`quant.program.expert_branches`).
MIXTURE = ROUTES | BRANCHING | GATHERING
FLOAT_DIALECT: frozenset[Callable[..., object]] = (
    STATEFUL
    | ELEMENTWISE
    | MIXTURE
    | {EMBEDDING, LINEAR, RMS_NORM, LAYER_NORM, L2_NORM, ROPE, ADD, MUL, VIEW, SPLIT, SIZE, GET}
)
# Operators that round an activation before a product reads it.
ROUNDINGS: frozenset[Callable[..., object]] = frozenset({ROUND_PER_TOKEN, ROUND_PER_TENSOR})
QUANTIZED_DIALECT = FLOAT_DIALECT | ROUNDINGS | {QUANT_LINEAR, QUANT_EMBEDDING}

# `exporters.last_token` inserts the slice, for graphs that return only the last tokens' logits.
LOWERED_DIALECT = QUANTIZED_DIALECT | {LAST}

# Operators that work token by token: each output row depends only on the same row of the inputs.
POINTWISE = (
    ROUNDINGS
    | ELEMENTWISE
    | ROUTES
    | {EMBEDDING, LINEAR, RMS_NORM, LAYER_NORM, L2_NORM, ADD, MUL, SPLIT, GET}
    | {QUANT_LINEAR, QUANT_EMBEDDING}
)


class DialectError(QuantizationError):
    """A program contains something that no exporter can translate."""


def check_float(program: Program) -> None:
    """Checks a program as traced, before quantization.

    Raises:
        DialectError: the program calls something outside the float dialect, passes keyword
            arguments (exporters read arguments by position), has an input that `Program.inputs`
            does not describe, or does not return logits.
    """
    _check(program, FLOAT_DIALECT, "float")


def check_quantized(program: Program) -> None:
    """Checks a program after `quant.program.rewrite.quantize_program`.

    Raises:
        DialectError: as for `check_float`, with the quantized dialect; or a quantized operator's
            arguments are not the stored parts of a weight in the expected order.
    """
    _check(program, QUANTIZED_DIALECT, "quantized")
    _check_operands(program)


def check_lowered(program: Program, positions: int = 1) -> None:
    """Checks a program that `exporters.last_token` changed to return the last positions' logits.

    Raises:
        DialectError: as for `check_quantized`, with the lowered dialect; or the program returns
            the logits of other positions.
    """
    _check(program, LOWERED_DIALECT, "lowered")
    _check_operands(program)
    shape = shape_of(program.output())
    kept = {node.args[2] for node in program.graph.nodes if node.target is LAST}
    if (positions == 1 and shape[1] != 1) or kept - {-positions}:
        wanted = (
            "one position's logits" if positions == 1 else f"the logits of {positions} positions"
        )
        raise DialectError(f"the lowered program returns shape {shape}, not {wanted}")


def _check_operands(program: Program) -> None:
    """Checks that quantized operators read the stored parts that their formats have.

    Raises:
        DialectError: an argument is missing or is another part.
    """
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
    """Checks that only integer products read a rounding, and that a static scale is a stored part.

    Raises:
        DialectError: another node reads the rounding, or its scale is not a stored part.
    """
    if any(user.target not in (QUANT_LINEAR, LAST) for user in node.users):
        raise DialectError(f"{node.name} is read by others than products with integer weights")
    if node.target is ROUND_PER_TENSOR:
        source = node.args[1]
        given = program.inputs.get(source.name) if isinstance(source, fx.Node) else None
        if given is None or given.kind != "weight" or given.part != INPUT_SCALE:
            raise DialectError(f"{node.name}: argument 1 is not the scale of a weight's inputs")


def _parts(node: fx.Node) -> tuple[str, str, str | None]:
    """The stored parts that a quantized operator takes, in order; None where it takes no third."""
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
                        f"the {label} dialect: write the family with edgeforge:: operators"
                    )
                if node.kwargs:
                    raise DialectError(
                        f"the {label} program calls {node.name} with the keyword "
                        f"{', '.join(node.kwargs)}, which exporters ignore: pass it by position"
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
