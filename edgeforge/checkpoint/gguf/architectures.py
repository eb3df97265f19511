"""What llama.cpp's architectures are called by transformers: configuration, tensors, their order.

To add one: a row of `ARCHITECTURES`. llama.cpp changes two things that a row undoes: in some
architectures the rows of queries and keys are in the order of its rotary embedding, and norms that
multiply by ``1 + w`` are stored as ``1 + w``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from edgeforge.checkpoint.gguf.metadata import Metadata
from edgeforge.errors import CheckpointError

Fields = dict[str, object]

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED_HEADS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PHI3: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_AFTER: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH: Final = {**_LLAMA, **_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_OLMO2: Final = {
    **{name: to for name, to in _LLAMA.items() if name not in ("attn_norm", "ffn_norm")},
    **_NORMED_HEADS,
    **_AFTER,
}
# No model has as many. A damaged or hostile file can claim a number that no memory could hold.
_MAX_LAYERS: Final = 10_000
# Fields that change nothing for a model of one expert: what a file was made with, or sizes that the
# tensors say as well.
_HARMLESS: Final = (
    "expert_count",
    "expert_used_count",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
)


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        model_type: the family in transformers.
        kind: the class that a configuration names.
        names: a layer's tensors, as llama.cpp and as transformers call them.
        interleaved: whether rows of queries and keys that are rotated together lie side by side.
        norms_of_one: whether norms are stored with 1 added.
        extra: further fields of the configuration, from the metadata and the fields so far.
    """

    model_type: str
    kind: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    interleaved: bool = False
    norms_of_one: bool = False
    extra: Callable[[Metadata, Fields], Fields] = lambda data, config: {}

    def tensor(self, name: str) -> str:
        """Returns transformers' name of a tensor; one that is not known keeps its own."""
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in _OUTER:
            return f"{_OUTER[parts[0]]}.{parts[1]}"
        if (
            len(parts) == 4
            and parts[0] == "blk"
            and parts[1].isdecimal()
            and parts[2] in self.names
        ):
            return f"model.layers.{parts[1]}.{self.names[parts[2]]}.{parts[3]}"
        return name

    def is_interleaved(self, name: str) -> bool:
        """Whether a tensor's rows are in the order of llama.cpp's rotary embedding."""
        return self.interleaved and name.split(".")[2:3] in (["attn_q"], ["attn_k"])

    def is_norm_of_one(self, name: str) -> bool:
        """Whether 1 was added to a tensor's values."""
        return self.norms_of_one and name.endswith("norm.weight")


def _qwen2(data: Metadata, config: Fields) -> Fields:
    return {"use_sliding_window": False}


def _qwen3(data: Metadata, config: Fields) -> Fields:
    return {"use_sliding_window": False, "attention_bias": False}


def _gemma(data: Metadata, config: Fields) -> Fields:
    del config["hidden_act"]
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(data: Metadata, config: Fields) -> Fields:
    del config["hidden_act"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": data.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": data.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": data.real("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(config, largest=46),
        "attention_bias": False,
    }


def _gemma3(data: Metadata, config: Fields) -> Fields:
    del config["hidden_act"]
    window = data.integer("attention.sliding_window")
    pattern = data.integer("attention.sliding_window_pattern", 6)
    count = int(str(config["num_hidden_layers"]))
    kinds = ("full_attention", "sliding_attention")
    soft = data.real("final_logit_softcapping", 0.0)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": [kinds[(at + 1) % pattern > 0] for at in range(count)],
        "rope_local_base_freq": data.real("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _query_scalar(config, largest=62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": soft or None,
        "attention_bias": False,
    }


def _query_scalar(config: Fields, largest: int) -> int:
    """Returns the number under the root of the attention scale, which no field says.

    llama.cpp knows the largest model of a generation by its number of layers: its scale is that of
    the hidden size over the heads. All others' is that of the head.
    """
    if config["num_hidden_layers"] == largest:
        return int(str(config["hidden_size"])) // int(str(config["num_attention_heads"]))
    return int(str(config["head_dim"]))


def _granite(data: Metadata, config: Fields) -> Fields:
    return {
        "attention_multiplier": data.real("attention.scale"),
        "embedding_multiplier": data.real("embedding_scale", 1.0),
        "residual_multiplier": data.real("residual_scale", 1.0),
        "logits_scaling": data.real("logit_scale", 1.0),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _smollm3(data: Metadata, config: Fields) -> Fields:
    return {"no_rope_layer_interval": 4, "use_sliding_window": False, "attention_bias": False}


def _olmo2(data: Metadata, config: Fields) -> Fields:
    return {"attention_bias": False}


def _phi3(data: Metadata, config: Fields) -> Fields:
    return {
        "sliding_window": data.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": data.integer(
            "rope.scaling.original_context_length", int(str(config["max_position_embeddings"]))
        ),
    }


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", extra=_qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_LLAMA, **_NORMED_HEADS}, extra=_qwen3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norms_of_one=True, extra=_gemma),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _SANDWICH, norms_of_one=True, extra=_gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**_SANDWICH, **_NORMED_HEADS},
        norms_of_one=True,
        extra=_gemma3,
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3, extra=_phi3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True, extra=_smollm3),
    "granite": Architecture("granite", "GraniteForCausalLM", interleaved=True, extra=_granite),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _OLMO2, extra=_olmo2),
}


def find_architecture(name: object, where: str) -> Architecture:
    """Returns an architecture by the name in a file.

    Raises:
        CheckpointError: EdgeForge does not read it.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise CheckpointError(
        f"{where} has the general.architecture {str(name)[:80]!r}; of GGUF files EdgeForge reads "
        f"{', '.join(ARCHITECTURES)}"
    )


def base_config(
    architecture: Architecture, data: Metadata, vocab_size: int, tied: bool
) -> tuple[Fields, int, int]:
    """Returns the fields of a ``config.json`` that all architectures share, and a head's widths.

    Args:
        architecture: the architecture.
        data: the file's metadata.
        vocab_size: rows of the embedding.
        tied: whether the file has no head of its own.

    Returns:
        The fields, the width of a head, and how many columns of it are rotated.

    Raises:
        CheckpointError: a field is missing or unusable, or names what EdgeForge does not read.
    """
    if data.integer("expert_count", 0) > 1:
        raise CheckpointError(
            f"{data.where} is a mixture of {data.integer('expert_count')} experts, which EdgeForge "
            f"does not read from GGUF files: give the checkpoint in safetensors files"
        )
    for name in _HARMLESS:
        data.get(name)
    if data.get("attention.causal") is False:
        raise CheckpointError(
            f"{data.where} is an encoder, each token attends to later ones too: EdgeForge exports "
            f"only causal language models"
        )
    hidden, heads = data.integer("embedding_length"), data.integer("attention.head_count")
    if not heads:
        raise CheckpointError(f"{data.where} claims a model without attention heads")
    layers = data.integer("block_count")
    if layers > _MAX_LAYERS:
        raise CheckpointError(
            f"{data.where} claims {layers} layers; EdgeForge reads {_MAX_LAYERS} at most"
        )
    head_dim = data.integer("attention.key_length", hidden // heads)
    if data.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{data.where} has keys of width {head_dim} and values of width "
            f"{data.integer('attention.value_length')}; EdgeForge reads models where both are equal"
        )
    config: Fields = {
        "architectures": [architecture.kind],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": data.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": data.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": data.integer("context_length"),
        "rms_norm_eps": data.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": data.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
    }
    return config, head_dim, data.integer("rope.dimension_count", head_dim)
