"""What the families with Mamba 2 layers share: a layer's dimensions and its weights' names."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import bias, convolution, matrix, norm
from edgeforge.families.spec import LayerSpec, Piece, RecurrenceSpec, Role, WeightSpec
from quant.quoted import quoted

_STEPS: Final = "time_step_limit"
# JSON has no infinity, and transformers has written it in several ways.
_INFINITE: Final = (math.inf, "Infinity", {"__float__": "Infinity"})


@dataclass(frozen=True)
class MambaFields:
    """The fields of a configuration that describe its Mamba 2 layers, with their defaults.

    Attributes:
        heads: the number of heads.
        head_dim: a head's width, which some files leave to be computed (``auto``).
        groups: heads of queries and keys (C and B).
        state: width of a query and a key.
        expand: the inner width as a multiple of the residual stream's.
        width: tokens that the convolution reads.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the products have one.
        chunk: tokens that a kernel takes at once, which change no number.
    """

    heads: tuple[str, int] = ("mamba_n_heads", 128)
    head_dim: tuple[str, int | None] = ("mamba_d_head", None)
    groups: tuple[str, int] = ("mamba_n_groups", 1)
    state: tuple[str, int] = ("mamba_d_state", 256)
    expand: tuple[str, int] = ("mamba_expand", 2)
    width: tuple[str, int] = ("mamba_d_conv", 4)
    conv_bias: tuple[str, bool] = ("mamba_conv_bias", True)
    proj_bias: tuple[str, bool] = ("mamba_proj_bias", False)
    chunk: tuple[str, int] = ("mamba_chunk_size", 256)


@dataclass(frozen=True)
class MambaLayers:
    """What a configuration says of its Mamba 2 layers.

    Attributes:
        recurrence: the dimensions of the recurrence.
        conv_width: tokens that the convolution reads, the token itself among them.
        conv_bias: whether the convolution has a bias.
        proj_bias: whether the products have one.
    """

    recurrence: RecurrenceSpec
    conv_width: int
    conv_bias: bool
    proj_bias: bool

    def layer(self, ffn_width: int) -> LayerSpec:
        """Returns a layer whose mixer is Mamba 2."""
        return LayerSpec(0, 0, ffn_width, rope=None, mixer="mamba", recurrence=self.recurrence)

    def weights(self, at: str, hidden: int) -> dict[str, WeightSpec]:
        """Returns the mixer's weights by their names within the layer.

        The rows of the checkpoint's ``in_proj`` are the gate, x, B, C, and each head's step; the
        steps' rows are a weight of their own.

        Args:
            at: what precedes the names of the mixer's tensors in the checkpoint.
            hidden: width of the residual stream.
        """
        made = self.recurrence
        heads, inner = made.heads, made.heads * made.value_width
        columns = inner + 2 * made.key_heads * made.key_width
        rows = inner + columns

        def part(tensor: str, *shape: int, first: int = 0) -> Piece:
            return Piece(at + tensor, shape, first, rows + heads)

        weights = {
            "mamba.in_proj": _of(part("in_proj.weight", rows, hidden), "linear"),
            "mamba.dt_proj": _of(part("in_proj.weight", heads, hidden, first=rows), "gate"),
            "mamba.conv": convolution(f"{at}conv1d.weight", columns, self.conv_width),
            "mamba.decay": WeightSpec(
                (heads,), (Piece(f"{at}A_log", (heads,)),), "gain", form="negative_exponential"
            ),
            "mamba.skip": WeightSpec((heads, 1), (Piece(f"{at}D", (heads,)),), "gain"),
            "mamba.norm": norm(f"{at}norm.weight", inner),
            "mamba.out_proj": matrix("linear", inner, (f"{at}out_proj.weight", hidden)),
        }
        step = bias((f"{at}dt_bias", heads))
        if self.proj_bias:
            weights["mamba.in_proj.bias"] = _of(part("in_proj.bias", rows), "bias")
            weights["mamba.dt_proj.bias"] = _of(part("in_proj.bias", heads, first=rows), "bias")
            weights["mamba.step.bias"] = step
            weights["mamba.out_proj.bias"] = bias((f"{at}out_proj.bias", hidden))
        else:
            weights["mamba.dt_proj.bias"] = step
        if self.conv_bias:
            weights["mamba.conv.bias"] = bias((f"{at}conv1d.bias", columns))
        return weights


def read_mamba(config: ConfigReader, hidden: int, fields: MambaFields) -> MambaLayers:
    """Reads the dimensions of a configuration's Mamba 2 layers.

    Args:
        config: the reader of ``config.json``.
        hidden: width of the residual stream.
        fields: the family's names of the fields, and their defaults.

    Raises:
        CheckpointError: the dimensions contradict each other, or steps have bounds.
    """
    config.choice("hidden_act", ("silu", "swish"), "silu")
    config.get(fields.chunk[0])
    _check_steps(config)
    heads, expand = config.integer(*fields.heads), config.integer(*fields.expand)
    inner = expand * hidden
    if inner % heads:
        raise CheckpointError(
            f"{config.where}: {fields.expand[0]} times hidden_size is {inner}, which is not a "
            f"multiple of {fields.heads[0]} {heads}"
        )
    field, width = fields.head_dim
    width = inner // heads if width is None else width
    if config.get(field) != "auto":
        width = config.integer(field, width)
    if width * heads != inner:
        raise CheckpointError(
            f"{config.where}: {fields.heads[0]} {heads} times {field} {width} is not "
            f"{fields.expand[0]} times hidden_size, {inner}"
        )
    groups = config.integer(*fields.groups)
    if heads % groups:
        raise CheckpointError(
            f"{config.where}: {fields.heads[0]} {heads} is not a multiple of "
            f"{fields.groups[0]} {groups}"
        )
    return MambaLayers(
        RecurrenceSpec(heads, groups, config.integer(*fields.state), width),
        config.integer(*fields.width, minimum=2),
        config.flag(*fields.conv_bias),
        config.flag(*fields.proj_bias),
    )


def pass_over(config: ConfigReader, fields: MambaFields) -> None:
    """Reads the fields of Mamba 2 layers in a file whose model has none."""
    for name in (*(getattr(fields, each.name)[0] for each in dataclasses.fields(fields)), _STEPS):
        config.get(name)


def _of(piece: Piece, role: Role) -> WeightSpec:
    return WeightSpec(piece.shape, (piece,), role)


def _check_steps(config: ConfigReader) -> None:
    """Refuses bounds of steps, which transformers applies to prompts and not to single tokens.

    Raises:
        CheckpointError: there is a bound other than zero and infinity.
    """
    given = config.get(_STEPS)
    if given is None or config.is_ignored(_STEPS):
        return
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise CheckpointError(f"{config.where}: {_STEPS} is {quoted(given)}, not two numbers")
    for which, value, neutral in (("first", given[0], (0,)), ("second", given[1], _INFINITE)):
        if value not in neutral:
            raise CheckpointError(
                f"{config.where}: the {which} number of {_STEPS} is {quoted(value)}; EdgeForge "
                f"implements steps without bounds, from 0 to infinity"
            )
