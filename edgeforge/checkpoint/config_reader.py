"""Reads a ``config.json`` field by field, so that no field that changes the maths is missed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from edgeforge.checkpoint.metadata_fields import is_metadata
from edgeforge.errors import CheckpointError
from quant.quoted import quoted
from quant.suggestion import nearest

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

    def is_ignored(self, field: str) -> bool:
        """Returns whether the user knows that a field does not change the maths."""
        return field in self._ignore

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

    def require(self, field: str, neutral: object) -> None:
        """Refuses a field unless it is absent or has the one value that changes nothing.

        Args:
            field: the field's name, which the message says.
            neutral: that value; numbers may differ from it as a decimal notation of it does.
        """
        value = self.get(field)
        if value is not None and not _is_same(value, neutral):
            self._refuse(field)

    def section(self, field: str) -> ConfigReader | None:
        """Returns the reader of a nested object, None when it is absent."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {field} is {_show(value)}, not an object")
        return ConfigReader(value, self._ignore, f"{self.where}: {field}")

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigReader:
        """Returns a reader of the same fields and, where the file has none or null, of others.

        What either of the two readers reads counts as read for both.
        """
        given = {field: value for field, value in self._config.items() if value is not None}
        other = ConfigReader({**self._config, **defaults, **given}, self._ignore, self.where)
        other._read = self._read
        return other

    def finish(self) -> None:
        """Refuses the first field that is set, was never read and is not known to be harmless."""
        known = self._read | self._ignore
        for field, value in self._config.items():
            if field not in known and not is_metadata(field) and not _is_off(value):
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


def _is_same(value: object, neutral: object) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    if not isinstance(value, int | float):
        return value == neutral
    return isinstance(neutral, int | float) and math.isclose(value, neutral, rel_tol=1e-6)


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
