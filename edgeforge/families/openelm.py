"""OpenELM (arXiv 2404.14619): every layer has its own head counts and feed-forward width.

transformers does not implement OpenELM, and the code released with its checkpoints no longer loads.
This file reads the configuration and maps the weights directly.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader, token_ids
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import assemble, matrix, norm, packed_qkv
from edgeforge.families.rotary import rotated_columns
from edgeforge.families.spec import LayerSpec, ModelSpec, RopeSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an OpenELM configuration; computes the lists by layer that the file lacks."""
    config.choice("activation_fn_name", ("swish", "silu"), "swish")
    config.choice("normalization_layer_name", ("rms_norm",), "rms_norm")
    if not config.flag("ffn_with_glu", True):
        raise CheckpointError(
            f"{config.where}: ffn_with_glu is false; EdgeForge implements only the gated form"
        )
    hidden, head_dim = config.integer("model_dim"), config.integer("head_dim")
    layers = read_layers(config, hidden, head_dim)
    vocab = config.integer("vocab_size", 32000)
    qk_norm = config.flag("normalize_qk_projections", False)
    tied = config.flag("share_input_output_layers", False)
    # Some exports of the files repeat the field above under this name; the field above decides.
    config.get("tie_word_embeddings")
    max_context = config.integer("max_context_length", 2048)
    # The number of precomputed rotary rows, twice the context; it changes no result.
    config.get("rope_max_length")
    fields = config.raw()

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        at = f"transformer.layers.{index}."
        q, kv = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
        qk, v = packed_qkv(at + "attn.qkv_proj.weight", hidden, q, kv)
        weights = {
            "input_layernorm": norm(at + "attn_norm.weight", hidden),
            "self_attn.qk_proj": qk,
            "self_attn.v_proj": v,
        }
        if qk_norm:
            weights["self_attn.q_norm"] = norm(at + "attn.q_norm.weight", head_dim)
            weights["self_attn.k_norm"] = norm(at + "attn.k_norm.weight", head_dim)
        weights |= {
            "self_attn.o_proj": matrix("linear", q, (at + "attn.out_proj.weight", hidden)),
            "post_attention_layernorm": norm(at + "ffn_norm.weight", hidden),
            "mlp.gate_up_proj": matrix(
                "linear", hidden, (at + "ffn.proj_1.weight", 2 * layer.ffn_width)
            ),
            "mlp.down_proj": matrix("linear", layer.ffn_width, (at + "ffn.proj_2.weight", hidden)),
        }
        return weights

    return ModelSpec(
        model_type="openelm",
        hidden_size=hidden,
        head_dim=head_dim,
        vocab_size=vocab,
        layers=layers,
        norm_eps=1e-6,
        ropes=(RopeSpec(config.real("rope_freq_constant", 10000.0), rotated_columns(head_dim)),),
        tied=tied,
        max_context=max_context,
        bos=next(iter(token_ids(fields, generation, "bos_token_id", vocab)), None),
        eos=token_ids(fields, generation, "eos_token_id", vocab),
        pad=next(iter(token_ids(fields, generation, "pad_token_id", vocab)), None),
        weights=assemble(
            hidden_size=hidden,
            vocab_size=vocab,
            layers=layers,
            layer_weights=layer_weights,
            embedding="transformer.token_embeddings.weight",
            final_norm={"weight": norm("transformer.norm.weight", hidden)},
            head=None if tied else "lm_head.weight",
        ),
        ignored=("lm_head.weight",) if tied else (),
    )


def read_layers(config: ConfigReader, model_dim: int, head_dim: int) -> tuple[LayerSpec, ...]:
    """Returns the dimensions of each layer, listed in the file or computed from multipliers.

    Raises:
        CheckpointError: a list has a wrong length, or a layer's query heads are not a multiple of
            its key/value heads.
    """
    count = config.layer_count("num_transformer_layers")
    groups = config.integer("num_gqa_groups", 1)
    divisor = config.integer("ffn_dim_divisor", 256)
    qkv = config.reals("qkv_multipliers")
    heads = config.integers("num_query_heads", count)
    kv_heads = config.integers("num_kv_heads", count)
    if heads is None:
        scaled = _by_layer(config, "qkv_multipliers", qkv or (1.0,), count)
        heads = tuple(make_divisible(model_dim * m, head_dim * groups) // head_dim for m in scaled)
    if kv_heads is None:
        kv_heads = tuple(h // groups for h in heads)
    for index, (h, k) in enumerate(zip(heads, kv_heads, strict=True)):
        if k == 0 or h % k:
            raise CheckpointError(
                f"{config.where}: layer {index} has {h} query heads, not a multiple of its {k} "
                f"key/value heads"
            )
    ffn = _by_layer(config, "ffn_multipliers", config.reals("ffn_multipliers") or (4.0,), count)
    widths = [make_divisible(model_dim * m, divisor) for m in ffn]
    return tuple(map(LayerSpec, heads, kv_heads, widths))


def make_divisible(value: float, divisor: int) -> int:
    """Returns the multiple of ``divisor`` nearest ``value`` that is at least nine tenths of it.

    >>> [make_divisible(v, 256) for v in (100, 640, 700, 896)]
    [256, 768, 768, 1024]
    """
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _by_layer(
    config: ConfigReader, field: str, values: tuple[float, ...], count: int
) -> tuple[float, ...]:
    if len(values) == 1:
        return values * count
    if len(values) == count:
        return values
    if len(values) == 2:
        low, high = values
        step = (high - low) / (count - 1) if count > 1 else 0.0
        return tuple(round(low + step * i, 2) for i in range(count))
    raise CheckpointError(
        f"{config.where}: {field} lists {len(values)} numbers; it must be one, a [min, max] pair, "
        f"or one for each of the {count} layers"
    )
