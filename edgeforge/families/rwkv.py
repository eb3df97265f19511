"""What RWKV 5 and 6 share: the fields of their configurations, and most of a layer's tensors.

The folders are those of Hugging Face whose code is remote (``modeling_rwkv5.py``,
``modeling_rwkv6.py``), which is never run here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import EMBEDDING, assemble, bias, matrix, norm
from edgeforge.families.spec import Form, LayerSpec, ModelSpec, Piece, RecurrenceSpec, WeightSpec

TRAINED_CONTEXT: Final = 4096
"""Tokens of the texts on which all releases were trained; their configurations do not say it."""

_EPS: Final = 1e-5
_CONTEXTS: Final = ("max_position_embeddings", "context_length", "ctx_len")
_PROJECTIONS: Final = ("receptance", "key", "value", "gate")

Mixes = Callable[[str, int, RecurrenceSpec], dict[str, WeightSpec]]
"""Weights of a time mix that only one version has, by their names within it.

Called with the prefix of the checkpoint's tensors, the residual stream's width, and the recurrence.
"""


def read_rwkv(
    config: ConfigReader,
    generation: Mapping[str, object],
    *,
    model_type: str,
    versions: tuple[str, ...],
    dynamic: bool,
    mixes: Mixes,
    channel_mixes: tuple[tuple[str, str], ...],
    form: Form,
) -> ModelSpec:
    """Returns the spec of an RWKV configuration.

    Args:
        config: ``config.json``.
        generation: ``generation_config.json``, or an empty mapping.
        model_type: the family's name.
        versions: the versions that the fields may name.
        dynamic: whether decays and mixes are made of each token.
        mixes: the time mix's weights that only this version has.
        channel_mixes: the channel mix's factors: our name, and the tensor's.
        form: how mixes are made of the checkpoint's numbers.

    Raises:
        CheckpointError: a field is missing, wrong, or of another version.
    """
    for field in ("model_version", "rwkv_version"):
        if config.get(field) is not None:
            config.choice(field, versions, versions[0])
    hidden, count = config.integer("hidden_size"), config.layer_count("num_hidden_layers")
    size = _read_head_size(config, hidden)
    made = RecurrenceSpec(hidden // size, hidden // size, size, size, dynamic)
    ffn = config.integer("intermediate_size", max(32, int(hidden * 3.5) // 32 * 32))
    vocab, tied = config.integer("vocab_size"), config.flag("tie_word_embeddings", False)
    config.require("attention_hidden_size", hidden)
    config.require("layer_norm_epsilon", _EPS)  # that of the last norm is a constant
    config.require("head_size_divisor", 8)
    config.get("rescale_every")  # halves activations and weights alike, for float16's range
    layer = LayerSpec(
        0,
        0,
        ffn,
        rope=None,
        mixer="time_mix",
        recurrence=made,
        feed_forward="channel_mix",
    )
    layers, fields = (layer,) * count, config.raw()

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        at = f"rwkv.blocks.{index}."
        attention, channels = f"{at}attention.", f"{at}feed_forward."
        weights = _norm("input_layernorm", f"{at}ln1", hidden)
        mixing = {
            **mixes(attention, hidden, made),
            "bonus": numbers(f"{attention}time_faaaa", (made.heads, size)),
            **{
                f"{name}_proj": matrix("linear", hidden, (f"{attention}{name}.weight", hidden))
                for name in (*_PROJECTIONS, "output")
            },
            "head_norm": numbers(f"{attention}ln_x.weight", (hidden,)),
            "head_norm.bias": bias((f"{attention}ln_x.bias", hidden)),
        }
        weights |= {f"time_mix.{name}": weight for name, weight in mixing.items()}
        weights |= _norm("post_attention_layernorm", f"{at}ln2", hidden)
        for ours, theirs in channel_mixes:
            weights[f"mlp.{ours}"] = mix(channels + theirs, hidden, form)
        for name, columns, rows in (
            ("key", hidden, ffn),
            ("receptance", hidden, hidden),
            ("value", ffn, hidden),
        ):
            product = matrix("linear", columns, (f"{channels}{name}.weight", rows))
            weights[f"mlp.{name}_proj"] = product
        return weights

    weights = assemble(
        hidden_size=hidden,
        vocab_size=vocab,
        layers=layers,
        layer_weights=layer_weights,
        embedding="rwkv.embeddings.weight",
        final_norm={
            "weight": norm("rwkv.ln_out.weight", hidden),
            "bias": bias(("rwkv.ln_out.bias", hidden)),
        },
        head=None if tied else "head.weight",
    )
    first = {
        "model.embedding_norm.weight": norm("rwkv.blocks.0.pre_ln.weight", hidden),
        "model.embedding_norm.bias": bias(("rwkv.blocks.0.pre_ln.bias", hidden)),
    }
    return ModelSpec(
        model_type=model_type,
        hidden_size=hidden,
        head_dim=size,
        vocab_size=vocab,
        layers=layers,
        norm_eps=_EPS,
        ropes=(),
        tied=tied,
        max_context=_read_context(config),
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), 0),
        eos=token_ids(fields, generation, "eos_token_id", vocab) or (0,),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        norm="layer",
        weights={EMBEDDING: weights.pop(EMBEDDING), **first, **weights},
        ignored=("head.weight",) if tied else (),
    )


def mix(tensor: str, width: int, form: Form) -> WeightSpec:
    """Returns how much of the token before each column has, a tensor ``[1, 1, width]``."""
    return WeightSpec((width,), (Piece(tensor, (1, 1, width)),), "gain", form=form)


def numbers(tensor: str, shape: tuple[int, ...], form: Form = "plain") -> WeightSpec:
    """Returns numbers that stay float: of each column, or of each head."""
    return WeightSpec(shape, (Piece(tensor, shape),), "gain", form=form)


def _norm(name: str, tensor: str, width: int) -> dict[str, WeightSpec]:
    return {
        name: norm(f"{tensor}.weight", width),
        f"{name}.bias": bias((f"{tensor}.bias", width)),
    }


def _read_head_size(config: ConfigReader, hidden: int) -> int:
    """Returns the width of a head; what files call ``num_attention_heads`` is mostly that width."""
    heads = config.integer("num_attention_heads", 64)
    size = config.integer("head_size", heads)
    if hidden % size:
        raise CheckpointError(
            f"{config.where}: heads of {size} columns (head_size, or num_attention_heads where "
            f"there is none) do not divide hidden_size, which is {hidden}"
        )
    if config.get("num_attention_heads") is not None and heads not in (size, hidden // size):
        raise CheckpointError(
            f"{config.where}: num_attention_heads is {heads}, but hidden_size {hidden} and "
            f"head_size {size} make {hidden // size} heads"
        )
    return size


def _read_context(config: ConfigReader) -> int:
    stated = [config.integer(field) for field in _CONTEXTS if config.get(field) is not None]
    return stated[0] if stated else TRAINED_CONTEXT
