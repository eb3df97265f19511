"""Parses JSON that anyone may have written, within bounds; its errors say what is wrong."""

from __future__ import annotations

import json
import math

# Every JSON value needs one "{", "[" or ",", so their count bounds what a parser can allocate.
MAX_MARKS = 2_000_000
MAX_DIGITS = 100
_ESCAPED_SURROGATE = b"\\ud"


class JsonError(ValueError):
    """The text is no JSON that EdgeForge reads; the message follows the text's name."""


def parse_json(content: bytes, *, strict: bool = True) -> object:
    """Parses a JSON text.

    Args:
        content: UTF-8 text.
        strict: whether NaN, Infinity and numbers beyond float64 are refused, and keys that occur
            twice with the same value.

    Raises:
        JsonError: the text is not JSON, is nested too deep, has too many values or a number of too
            many digits, or holds half of a surrogate pair, or a key twice with different values.

    >>> parse_json(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    if sum(content.count(mark) for mark in (b"{", b"[", b",")) > MAX_MARKS:
        raise JsonError("claims more than a million values: it is damaged or hostile")
    if content.startswith(b"\xef\xbb\xbf"):
        raise JsonError(
            "begins with a byte order mark, which JSON does not allow: save it as UTF-8 without one"
        )
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_refuse_repeated if strict else _refuse_ambiguous,
            parse_constant=_refuse_constant if strict else None,
            parse_float=_finite if strict else None,
            parse_int=_integer,
        )
        if _ESCAPED_SURROGATE in content.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a pair cannot be encoded
    except RecursionError:
        raise JsonError("is nested too deep: it is damaged or hostile") from None
    except UnicodeEncodeError:
        raise JsonError(
            "is not valid JSON (it holds half of a surrogate pair, which is no text): it is damaged"
        ) from None
    except UnicodeDecodeError as error:
        raise JsonError(
            f"is not valid JSON (not UTF-8: {error.reason} at byte {error.start}): it is damaged"
        ) from None
    except ValueError as error:
        raise JsonError(f"is not valid JSON ({error}): it is damaged") from None
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond every number")
    return number


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_repeated(pairs)[:80]!r} occurs twice")
    return found


def _refuse_ambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Lets a key occur twice with one value: which of two values a reader takes is not known."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"the key {name[:80]!r} occurs twice, with different values")
    return found


def _repeated(pairs: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
