"""Fields of a ``config.json`` that change no number that a model computes, by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

# Fields about how a model is trained, stored, sampled or displayed.
_NAMES: Final = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bf16",
        "bos_token",
        "cache_implementation",
        "chunk_size_feed_forward",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "eos_token",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuned",
        "finetuning_task",
        "fp16",
        "fp32",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "internal_version",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "license",
        "mask_value",
        "max_length",
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "min_length",
        "model_max_length",
        "model_name",
        "model_type",
        "model_version",
        "name",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "seq_length",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token",
        "use_bfloat16",
        "use_cache",
        "use_gradient_checkpointing",
        "use_memory_efficient_attention",
        "use_xformers",
    }
)
# Dropout acts in training only, and a kernel for attention computes the same attention.
_PATTERNS: Final = (
    "*_pdrop",
    "*_token_id",
    "*_token_ids",
    "*_token_index",
    "*dropout",
    "*dropout_prob",
    "*_init_scale",
    "*_xavier_init",
    "*flash_att*",
    "hidden_dropout_*",
    "tokenizer",
    "tokenizer_*",
    "unsloth_*",
)


def is_metadata(field: str) -> bool:
    """Whether a field changes no number, whatever its value is.

    >>> [is_metadata(field) for field in ("internal_version", "use_flash_attn", "clip_qkv")]
    [True, True, False]
    """
    return field in _NAMES or any(fnmatchcase(field, pattern) for pattern in _PATTERNS)
