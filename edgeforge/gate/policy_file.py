"""Reads a policy from YAML; every mistake in it is one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from edgeforge.errors import UsageError
from edgeforge.gate.metrics import (
    BENCH_RATIOS,
    COMPARED,
    FIGURES,
    MODULE_COMPARED,
    RATIOS,
    SHARES,
    SIZE,
)
from edgeforge.gate.policy import Policy, Range, Ratio, Rule, Terms, refuse_contradiction
from edgeforge.sizes import parse_size
from edgeforge.verification.sample import parse_tokens
from exporters.registry import TARGETS
from quant.input_files import read_input
from quant.quoted import quoted
from quant.suggestion import did_you_mean
from quant.yaml_input import YamlError, parse_yaml

Told = TypeVar("Told")

LARGEST_POLICY = 1 << 20
_VERSION = "1"
_SPEEDS: Final = (*RATIOS, *BENCH_RATIOS)
_TERMS: Final = ("text", "tokens", "checkpoint", "bounds", *_SPEEDS, "worse_by", "allow")
_TOP: Final = ("version", "artifacts", "baseline", *_TERMS, "rules")
_MATCH: Final = ("path", "target", "recipe", "model")
# An artifact that is not as it was written, or gives no numbers, is none.
_NEVER: Final = ("files", "run", "non_finite")
_SIDES: Final = ("at_most", "at_least")


def read_policy(path: Path) -> Policy:
    """Reads a policy.

    Raises:
        UsageError: the file cannot be read, or holds what no policy can.
    """
    try:
        data = parse_yaml(read_input(path, LARGEST_POLICY))
    except OSError as error:
        raise UsageError(f"the policy {path} cannot be read: {error.strerror}") from error
    except YamlError as error:
        raise UsageError(f"the policy {path} {error}") from None
    reader = _Reader(path)
    top = reader.table(data, "the policy", _TOP)
    version = top.get("version")
    if version != _VERSION:
        raise UsageError(
            f"{path}: version is {quoted(version)}; this EdgeForge reads policies of version "
            f"{_VERSION}: write 'version: {_VERSION}'"
        )
    rules = reader.items(top.get("rules", []), "rules")
    baseline = top.get("baseline")
    return Policy(
        folder=path.parent,
        path=path,
        artifacts=tuple(
            reader.text(each, "artifacts") for each in reader.items(top.get("artifacts", []))
        ),
        baseline=None if baseline is None else reader.place(baseline, "baseline"),
        terms=reader.terms(top, "", "the policy"),
        rules=tuple(reader.rule(number, each) for number, each in enumerate(rules, start=1)),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads the parts of a policy; messages begin with its path."""

    path: Path

    def rule(self, number: int, data: object) -> Rule:
        where = f"rule {number}"
        row = self.table(data, where, ("match", *_TERMS))
        if "match" not in row:
            raise self._error(
                f"{where} has no match: say which artifacts it is for, as in "
                f"'match: {{target: coreml}}'"
            )
        match = self.table(row["match"], f"{where}: match", _MATCH)
        if not match:
            raise self._error(f"{where}: match is empty: what is for all artifacts stands above")
        patterns = {key: self.text(each, f"{where}: match.{key}") for key, each in match.items()}
        target = patterns.get("target")
        if target is not None and not set(target) & set("*?["):
            self._known(target, TARGETS, f"{where}: match.target", "target")
        unnamed = Rule(number, patterns, Terms())
        return Rule(number, patterns, self.terms(row, f"{where}: ", str(unnamed)))

    def terms(self, row: Mapping[str, object], where: str, source: str) -> Terms:
        tokens = row.get("tokens")
        text, checkpoint = row.get("text"), row.get("checkpoint")
        bounds = self._entries(row, where, "bounds", FIGURES, "figure")
        compared = (*COMPARED, *MODULE_COMPARED)
        worse_by = self._entries(row, where, "worse_by", compared, "compared figure")
        allow = self.table(row.get("allow", {}), f"{where}allow", None)
        return Terms(
            text=None if text is None else self.place(text, f"{where}text"),
            tokens=None if tokens is None else self._told(where, parse_tokens, tokens, "tokens"),
            checkpoint=None
            if checkpoint is None
            else self._checkpoint(self.text(checkpoint, f"{where}checkpoint")),
            bounds={
                name: self._range(name, each, f"{where}bounds", source)
                for name, each in bounds.items()
            },
            ratios={
                name: self._ratio(name, row[name], f"{where}{name}", source)
                for name in _SPEEDS
                if name in row
            },
            worse_by={
                name: self._number(each, f"{where}worse_by: {name}", share=True)
                for name, each in worse_by.items()
            },
            allow={name: self._reason(name, each, where) for name, each in allow.items()},
        )

    def table(
        self, data: object, where: str, known: Collection[str] | None
    ) -> Mapping[str, object]:
        """A mapping, all of whose keys are known."""
        if data == "":  # a key with nothing behind it
            return {}
        if not isinstance(data, dict):
            raise self._error(f"{where} is {quoted(data)}, not a mapping of names to values")
        if known is not None:
            for key in data:
                self._known(key, known, where, "key")
        return data

    def items(self, data: object, where: str = "artifacts") -> list[object]:
        """A list."""
        if data == "":
            return []
        if not isinstance(data, list):
            raise self._error(f"{where} is {quoted(data)}, not a list")
        return data

    def text(self, data: object, where: str) -> str:
        """A text that is not empty."""
        if not isinstance(data, str) or not data.strip():
            raise self._error(f"{where} is {quoted(data)}, not a text")
        return data

    def place(self, data: object, where: str) -> Path:
        """A path; a relative one begins at the policy's folder."""
        return self.path.parent / Path(self.text(data, where)).expanduser()

    def _entries(
        self, row: Mapping[str, object], where: str, key: str, known: Collection[str], what: str
    ) -> Mapping[str, object]:
        found = self.table(row.get(key, {}), f"{where}{key}", None)
        for name in found:
            self._known(name, known, f"{where}{key}", what)
        return found

    def _checkpoint(self, given: str) -> str:
        """A folder beside the policy, or else what `edgeforge.model.model.open_model` takes."""
        beside = self.path.parent / Path(given).expanduser()
        return str(beside) if beside.is_dir() else given

    def _range(self, name: str, data: object, where: str, source: str) -> Range:
        row = self.table(data, f"{where}: {name}", _SIDES)
        good = FIGURES[name].replace(" ", "_")
        if good not in row:
            raise self._error(
                f"{where}: {name} is better the {'smaller' if good == 'at_most' else 'larger'} it "
                f"is: give it {good}, as in '{name}: {{{good}: 0.5}}'"
            )
        sides = {side: self._limit(name, row[side], f"{where}: {name}: {side}") for side in row}
        found = Range(sides.get("at_most"), sides.get("at_least"), source)
        refuse_contradiction(f"{self.path}: {where}", name, found)
        return found

    def _limit(self, name: str, data: object, where: str) -> float:
        if name == SIZE:
            return float(self._told("", parse_size, data, where))
        return self._number(data, where, share=name in SHARES)

    def _ratio(self, name: str, data: object, where: str, source: str) -> Ratio:
        keys = (
            ("against", "at_least", "device") if name in BENCH_RATIOS else ("against", "at_least")
        )
        row = self.table(data, where, keys)
        for key in ("against", "at_least"):
            if key not in row:
                raise self._error(f"{where} has no {key}: it needs both against and at_least")
        limit = self._number(row["at_least"], f"{where}: at_least", share=False)
        device = self.text(row.get("device", "*"), f"{where}: device")
        return Ratio(self.place(row["against"], f"{where}: against"), limit, source, device)

    def _reason(self, name: str, data: object, where: str) -> str:
        if name in FIGURES or name in _NEVER:
            instead = "give it a bound under bounds" if name in FIGURES else "export it again"
            raise self._error(f"{where}allow: {name} cannot be allowed: {instead}")
        if not isinstance(data, str) or len(data.split()) < 2:
            raise self._error(
                f"{where}allow: {name} needs a reason in words, as in '{name}: the app never "
                f"passes 512 tokens'"
            )
        return data

    def _number(self, data: object, where: str, *, share: bool) -> float:
        try:
            number = float(data) if isinstance(data, str) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise self._error(f"{where} is {quoted(data)}, not a number of 0 or more")
        if share and number > 1:
            raise self._error(f"{where} is {quoted(data)}, but it is a share of at most 1")
        return number

    def _told(self, where: str, parse: Callable[[str], Told], data: object, what: str) -> Told:
        try:
            return parse(self.text(data, f"{where}{what}"))
        except UsageError as error:
            raise self._error(f"{where}{what}: {error}") from None

    def _known(self, name: str, known: Collection[str], where: str, what: str) -> None:
        if name in known:
            return
        raise self._error(
            f"{where} has no {what} {quoted(name)}{did_you_mean(name, known)}; known: "
            f"{', '.join(known)}"
        )

    def _error(self, words: str) -> UsageError:
        return UsageError(f"{self.path}: {words}")
