"""Collects what is checked under each name, and makes one `Checked` of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from edgeforge.verification.bounds import Checked, Verdict

_LISTED: Final = 8


@dataclass
class _Fact:
    expected: str = ""
    found: float | None = None
    wanted: float | None = None
    count: int = 0
    places: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


class Findings:
    """The facts of one artifact, in the order in which they were first looked at."""

    def __init__(self) -> None:
        self._facts: dict[str, _Fact] = {}
        self._unread: list[str] = []

    def fact(self, name: str, expected: str, wanted: float | None = None) -> None:
        """Opens a fact.

        Args:
            name: its name behind ``meaning.``, or a whole name of a fact that others check too.
            expected: what must be, as a sentence that is true when nothing else is found.
            wanted: the number that is expected, for a fact that is a number.
        """
        self._facts.setdefault(name, _Fact(expected, wanted=wanted))

    def same(self, name: str, is_same: bool, place: str, sentence: str) -> bool:
        """Notes that a fact was looked at in one more place.

        Args:
            name: of an open fact.
            is_same: whether it is as expected there.
            place: where, in words.
            sentence: what was found there and what was expected; used when they differ.
        """
        fact = self._facts[name]
        fact.count += 1
        if not is_same:
            fact.places.append(place)
            fact.sentences.append(sentence)
        return is_same

    def number(self, name: str, found: float) -> None:
        """Notes the number that was found, where it is not the expected one."""
        self._facts[name].found = found

    def unread(self, what: str) -> None:
        """Notes a fact that cannot be read."""
        if what not in self._unread:
            self._unread.append(what)

    def checks(self) -> list[Checked]:
        """One result for each fact, and one that says what could not be read, if anything."""
        made = [_checked(name, fact) for name, fact in self._facts.items() if fact.count]
        if self._unread:
            message = f"not read from the files: {'; '.join(self._unread)}"
            where = tuple(self._unread)
            made.append(_result("meaning.unread", None, None, "doubtful", where, message))
        return made


def _checked(name: str, fact: _Fact) -> Checked:
    full = name if "." in name or name in _SHARED else f"meaning.{name}"
    if not fact.sentences:
        return _result(full, fact.wanted, fact.wanted, "passed", (), fact.expected)
    more = len(fact.sentences) - 1
    others = f", and {more} more of {fact.count} places" if more else ""
    where = tuple(dict.fromkeys(fact.places))[:_LISTED]
    message = f"{fact.sentences[0]}{others}"
    return _result(full, fact.found, fact.wanted, "failed", where, message)


_SHARED: Final = frozenset({"tokenizer", "eos", "bos", "pad", "context"})


def _result(
    name: str,
    value: float | None,
    limit: float | None,
    verdict: Verdict,
    where: Iterable[str],
    message: str,
) -> Checked:
    return Checked(
        name=name,
        value=value,
        limit=limit,
        sense="equal",
        verdict=verdict,
        where=tuple(where),
        message=message,
    )
