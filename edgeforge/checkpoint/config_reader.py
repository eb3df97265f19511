"""Reads a ``config.json`` field by field, so that no field that changes the maths is missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeforge.errors import CheckpointError
from quant.quoted import quoted
from quant.suggestion import nearest

# Fields about how a model is trained, stored, sampled or displayed. None changes what it computes.
_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


# No model has as many. A damaged or hostile file can claim a number that no memory could hold.
_MAX_LAYERS = 10_000
_MAX_NUMBER = 2**53


class ConfigReader:
    """A configuration that records which fields are read; `finish` refuses fields left unread.

    Args:
        config: the parsed ``config.json``.
        ignore: fields that the user knows not to change the maths, beside those known to be
            harmless.
        where: the mapping's name in messages.
    """

    def __init__(
        self, config: Mapping[str, object], ignore: Iterable[str] = (), where: str = "config.json"
    ) -> None:
        self._config = config
        self._read: set[str] = set()
        self._ignore = frozenset(ignore)
        self.where = where

    def fields(self) -> frozenset[str]:
        """Returns the names of the fields that are present."""
        return frozenset(self._config)

    def raw(self) -> Mapping[str, object]:
        """Returns the mapping itself, to read harmless fields from it."""
        return self._config

    def get(self, field: str, default: object = None) -> object:
        """Returns the field's value, or ``default`` when it is absent or null."""
        self._read.add(field)
        value = self._config.get(field)
        return default if value is None else value

    def _required(self, field: str, default: object) -> object:
        value = self.get(field, default)
        if value is None:
            near = nearest(field, self._config)
            hint = "" if near is None else f" (it has {near!r})"
            raise CheckpointError(f"{self.where} has no field {field!r}{hint}")
        return value

    def integer(self, field: str, default: int | None = None, minimum: int = 1) -> int:
        """Returns an integer of at least ``minimum``; the field is required without a default."""
        return _integer(self._required(field, default), f"{self.where}: {field}", minimum)

    def layer_count(self, field: str) -> int:
        """Returns the number of layers; the field is required."""
        count = self.integer(field)
        if count > _MAX_LAYERS:
            raise CheckpointError(
                f"{self.where}: {field} is {count}; EdgeForge reads {_MAX_LAYERS} layers at most"
            )
        return count

    def real(self, field: str, default: float | None = None) -> float:
        """Returns a finite number above zero; the field is required without a default."""
        return _real(self._required(field, default), f"{self.where}: {field}")

    def flag(self, field: str, default: bool) -> bool:
        """Returns a boolean."""
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {field} is {_show(value)}, not true or false")
        return value

    def integers(self, field: str, length: int) -> tuple[int, ...] | None:
        """Returns a list of ``length`` integers above zero, None when the field is absent."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise CheckpointError(
                f"{self.where}: {field} must list {length} numbers, one per layer"
            )
        return tuple(_integer(v, f"{self.where}: {field}[{i}]") for i, v in enumerate(value))

    def reals(self, field: str) -> tuple[float, ...] | None:
        """Returns numbers above zero (a single number as a list of one), None when absent."""
        value = self.get(field)
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        return tuple(_real(v, f"{self.where}: {field}[{i}]") for i, v in enumerate(values))

    def choice(self, field: str, allowed: tuple[str, ...], default: str) -> str:
        """Returns a word out of ``allowed``; refuses others, which name other computations."""
        value = self.get(field, default)
        if value not in allowed:
            raise CheckpointError(
                f"{self.where} sets {field} to {_show(value)}; EdgeForge implements "
                f"{' and '.join(map(repr, allowed))} here"
            )
        return str(value)

    def absent(self, *fields: str) -> None:
        """Refuses fields that change the maths unless they are off; the message names the field."""
        for field in fields:
            if not _is_off(self.get(field)):
                self._refuse(field)

    def require_one(self, *fields: str) -> None:
        """Refuses factors that change the maths unless they are 1; the message names the field."""
        for field in fields:
            if self.get(field, 1) != 1:
                self._refuse(field)

    def section(self, field: str) -> ConfigReader | None:
        """Returns the reader of a nested object, None when it is absent."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {field} is {_show(value)}, not an object")
        return ConfigReader(value, self._ignore, f"{self.where}: {field}")

    def finish(self) -> None:
        """Refuses the first field that is set, was never read and is not known to be harmless."""
        known = self._read | _HARMLESS | self._ignore
        for field in self._config:
            if field not in known and not _is_off(self._config[field]):
                self._refuse(field)

    def _refuse(self, field: str) -> None:
        if field in self._ignore:
            return
        option = field if field.isidentifier() and len(field) < 100 else quoted(field)
        raise CheckpointError(
            f"{self.where} sets {quoted(field)} to {_show(self._config[field])}, which EdgeForge "
            f"does not implement for this family and which may change the model's outputs; if you "
            f"know that it does not, pass --ignore-config {option}"
        )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _show(value: object) -> str:
    text = quoted(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(value: object, where: str, minimum: int = 1) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise CheckpointError(
            f"{where} is {_show(value)}, not a whole number of at least {minimum}"
        )
    if value > _MAX_NUMBER:
        raise CheckpointError(f"{where} is {_show(value)}, more than any model has")
    return value


def _real(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise CheckpointError(f"{where} is {_show(value)}, not a number")
    if not 0 < value <= _MAX_NUMBER:
        raise CheckpointError(
            f"{where} is {_show(value)}; it must be above zero and at most 2 to the 53rd"
        )
    return float(value)


def token_ids(
    config: Mapping[str, object], generation: Mapping[str, object], field: str, vocab_size: int
) -> tuple[int, ...]:
    """Returns special token ids without repeats, those of ``generation_config.json`` first.

    Some released files have a padding token outside the vocabulary. It is left out, because
    EdgeForge never pads.

    Args:
        config: ``config.json``.
        generation: ``generation_config.json``, or an empty mapping.
        field: the field's name, such as ``eos_token_id``.
        vocab_size: number of tokens of the vocabulary.

    Raises:
        CheckpointError: an id is not a token of the vocabulary.
    """
    found: list[int] = []
    for source in (generation, config):
        value = source.get(field)
        for token in value if isinstance(value, list) else [value]:
            if token is None or token in found:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                raise CheckpointError(f"{field} is {quoted(token)}, not a token id")
            if 0 <= token < vocab_size:
                found.append(token)
            elif token >= vocab_size and field != "pad_token_id":
                raise CheckpointError(
                    f"{field} is {token}, but the vocabulary has {vocab_size} tokens"
                )
    return tuple(found)
