"""The weights of small recurrent layers, and the specs that use every form of a recurrence."""

from __future__ import annotations

from dataclasses import replace

from edgeforge.families.assembly import bias, convolution, matrix, norm
from edgeforge.families.spec import LayerSpec, ModelSpec, Piece, RecurrenceSpec, WeightSpec
from edgeforge.model.delta_net import UNIT_EPS
from edgeforge.model.rwkv import MIXED

FFN, CONV = 48, 4
MAMBA = LayerSpec(0, 0, FFN, rope=None, mixer="mamba", recurrence=RecurrenceSpec(4, 2, 8, 12))
DELTA = LayerSpec(0, 0, FFN, rope=None, mixer="delta_net", recurrence=RecurrenceSpec(6, 3, 8, 10))
EAGLE = LayerSpec(
    0, 0, FFN, rope=None, mixer="time_mix", feed_forward="channel_mix",
    recurrence=RecurrenceSpec(4, 4, 8, 8, dynamic=False),
)  # fmt: skip
FINCH = replace(EAGLE, recurrence=RecurrenceSpec(4, 4, 8, 8))


def vector(tensor: str, width: int, form: str = "plain") -> WeightSpec:
    """A factor of each column."""
    return WeightSpec((width,), (Piece(tensor, (1, 1, width)),), "gain", form=form)  # type: ignore[arg-type]


def by_head(tensor: str, shape: tuple[int, ...], form: str = "plain") -> WeightSpec:
    """Numbers of each head: ``(h,)`` or ``(h, n)``, or ``(h, 1)`` of a tensor ``(h,)``."""
    held = shape[:1] if shape[-1] == 1 else shape
    return WeightSpec(shape, (Piece(tensor, held),), "gain", form=form)  # type: ignore[arg-type]


def turned(tensor: str, rows: int, columns: int) -> WeightSpec:
    """A matrix whose tensor has rows and columns exchanged."""
    return WeightSpec((rows, columns), (Piece(tensor, (columns, rows)),), "gate", transposed=True)


def mixer_weights(layer: LayerSpec, hidden: int) -> dict[str, WeightSpec]:
    """The weights of a layer's recurrence by their names within the layer."""
    made = layer.recurrence
    assert made is not None
    if layer.mixer == "time_mix":
        return _time_mix(made, hidden)
    inner = made.heads * made.value_width
    columns = 2 * made.key_heads * made.key_width + inner
    at = "mamba" if layer.mixer == "mamba" else "linear_attn"
    weights = {
        f"{at}.in_proj": matrix("linear", hidden, ("in_proj", inner + columns)),
        f"{at}.dt_proj": matrix("gate", hidden, ("dt_proj", made.heads)),
        f"{at}.dt_proj.bias": bias(("dt_bias", made.heads)),
        f"{at}.conv": convolution("conv", columns, CONV),
        f"{at}.decay": by_head("decay", (made.heads,), "negative_exponential"),
        f"{at}.out_proj": matrix("linear", inner, ("out_proj", hidden)),
    }
    if layer.mixer == "mamba":
        weights["mamba.conv.bias"] = bias(("conv.bias", columns))
        weights["mamba.skip"] = by_head("skip", (made.heads, 1))
        weights["mamba.norm"] = norm("mamba_norm", inner)
    else:
        weights["linear_attn.beta_proj"] = matrix("gate", hidden, ("beta", made.heads))
        weights["linear_attn.norm"] = norm("delta_norm", made.value_width)
    return weights


def _time_mix(made: RecurrenceSpec, hidden: int) -> dict[str, WeightSpec]:
    inner, shape = made.heads * made.key_width, (made.heads, made.key_width)
    form = "plain" if made.dynamic else "complement"
    mixes = MIXED if made.dynamic else MIXED[1:]
    weights = {f"mix_{name}": vector(f"mix_{name}", hidden, form) for name in mixes}
    if made.dynamic:
        weights["mix_all"] = vector("mix_all", hidden)
        weights["mix_down"] = turned("mix_down", 4 * len(mixes), hidden)
        for index, name in enumerate(mixes):
            up = Piece("mix_up", (4, hidden), 4 * index, 4 * len(mixes), len(mixes))
            weights[f"mix_up_{name}"] = WeightSpec((hidden, 4), (up,), "gate", transposed=True)
        weights["decay_down"] = turned("decay_down", 6, hidden)
        weights["decay_up"] = turned("decay_up", inner, 6)
        decay = Piece("decay", (1, 1, inner))
        weights["decay_up.bias"] = WeightSpec((inner,), (decay,), "bias")
    else:
        weights["decay"] = by_head("decay", shape, "negative_exponential")
    weights["bonus"] = by_head("bonus", shape)
    for name in ("receptance", "key", "value", "gate"):
        weights[f"{name}_proj"] = matrix("linear", hidden, (f"{name}_proj", inner))
    weights["output_proj"] = matrix("linear", inner, ("output_proj", hidden))
    weights["head_norm"] = WeightSpec((inner,), (Piece("head_norm", (inner,)),), "gain")
    weights["head_norm.bias"] = bias(("head_norm.bias", inner))
    return {f"time_mix.{name}": weight for name, weight in weights.items()}


def channel_mix_weights(layer: LayerSpec, hidden: int) -> dict[str, WeightSpec]:
    """The weights of RWKV's mix of channels."""
    width = layer.ffn_width
    return {
        "mlp.mix_key": vector("mlp.mix_key", hidden),
        "mlp.mix_receptance": vector("mlp.mix_receptance", hidden),
        "mlp.key_proj": matrix("linear", hidden, ("mlp.key", width)),
        "mlp.value_proj": matrix("linear", width, ("mlp.value", hidden)),
        "mlp.receptance_proj": matrix("linear", hidden, ("mlp.receptance", hidden)),
    }


def unit_epsilon(spec: ModelSpec) -> float:
    """What the norms to the length 1 of a spec's recurrences add to the sum of squares.

    Mamba normalises groups of columns by their mean square, which is their sum over their number.
    """
    layer = next(each for each in spec.layers if each.recurrence is not None)
    made = layer.recurrence
    if layer.mixer == "delta_net":
        return UNIT_EPS
    return spec.norm_eps * made.heads * made.value_width / made.key_heads
