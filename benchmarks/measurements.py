"""What was measured of a contender on a model, kept in a file from which tables are written.

A file names the facts on which its figures depend: the model's digest, the texts' digests, the
contender's settings, and digests of the code. A measurement whose facts are still those of today is
not repeated.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from judging import Scores
from pages import computer

from edgeforge.cache import read_record, write_record

SCHEMA: Final = 1
DIGITS: Final = 6  # of a kept divergence


@dataclass(frozen=True)
class OnText:
    """A contender's scores on one text.

    Attributes:
        tokens: how many of the text's tokens were judged.
        perplexity: FLOAT's on them.
        scores: block by block.
    """

    tokens: int
    perplexity: float
    scores: Scores


@dataclass(frozen=True)
class Measurement:
    """What was measured of a contender on a model.

    Attributes:
        contender: its name.
        kind: what the contender is (`contenders.Contender`).
        bits: stored bits of all matrices divided by their number of elements.
        nbytes: stored bytes of all matrices.
        seconds: what quantizing took, with all that was computed for it.
        machine: the machine, for people.
        day: date in ISO format.
        texts: scores by the text's name.
        facts: all that the figures depend on.
        refused: why there are no scores; empty where there are.
    """

    contender: str
    kind: str
    bits: float
    nbytes: float
    seconds: float
    machine: str
    day: str
    texts: Mapping[str, OnText]
    facts: Mapping[str, Any]
    refused: str = ""


def made_now(
    contender: str,
    kind: str,
    elements: int,
    stored_bits: float,
    seconds: float,
    texts: Mapping[str, OnText],
    facts: Mapping[str, Any],
) -> Measurement:
    """Returns a measurement that was just made on this machine."""
    bits, today = stored_bits / elements, date.today().isoformat()
    return Measurement(
        contender, kind, bits, stored_bits / 8, seconds, computer(), today, texts, facts
    )


def refused_now(contender: str, kind: str, reason: str, facts: Mapping[str, Any]) -> Measurement:
    """Returns the measurement of a contender that cannot hold the model."""
    today = date.today().isoformat()
    return Measurement(contender, kind, 0.0, 0.0, 0.0, computer(), today, {}, facts, reason)


class Kept:
    """The measurements of one model in a folder, one file each.

    Args:
        folder: of the model's measurements on certain texts; it may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, contender: str, facts: Mapping[str, Any] | None = None) -> Measurement | None:
        """Returns a contender's measurement, or None.

        Args:
            contender: its name.
            facts: what the measurement must depend on; None to take whatever is there.
        """
        found = read_record(self._file(contender))
        if found is None or found.pop("schema", None) != SCHEMA:
            return None
        if facts is not None and found["facts"] != json.loads(json.dumps(facts)):
            return None
        texts = {name: _read_text(given) for name, given in found.pop("texts").items()}
        return Measurement(texts=texts, **found)

    def write(self, measurement: Measurement) -> None:
        """Keeps a measurement in the place of an older one of the same contender."""
        content = {
            **{k: v for k, v in vars(measurement).items() if k != "texts"},
            "schema": SCHEMA,
            "texts": {name: _text(given) for name, given in measurement.texts.items()},
        }
        write_record(self._file(measurement.contender), content)

    def _file(self, contender: str) -> Path:
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in contender)
        return self._folder / f"{plain}.json"


def _text(given: OnText) -> dict[str, object]:
    def short(values: np.ndarray) -> list[float]:
        return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]

    return {
        "tokens": given.tokens,
        "perplexity": given.perplexity,
        "kl": [short(block) for block in given.scores.kl],
        "excess": given.scores.excess.tolist(),
        "top1": given.scores.top1.tolist(),
    }


def _read_text(given: Mapping[str, Any]) -> OnText:
    kl, excess, top1 = (np.array(given[part]) for part in ("kl", "excess", "top1"))
    return OnText(given["tokens"], given["perplexity"], Scores(kl, excess, top1))


@cache
def code_digest(root: Path, parts: tuple[str, ...]) -> str:
    """Returns a digest of source files that comments and docstrings do not change.

    Args:
        root: folder of the repository.
        parts: files, or folders whose ``.py``, ``.c`` and ``.h`` files all count.
    """
    total = hashlib.sha256()
    for part in parts:
        place = root / part
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in files:
            if file.suffix in (".c", ".h"):
                content = file.read_text(encoding="utf-8")
            elif file.suffix == ".py":
                content = _bare(file.read_text(encoding="utf-8"))
            else:
                continue
            total.update(f"{file.relative_to(root)}\n{content}\n".encode())
    return total.hexdigest()


def _bare(source: str) -> str:
    """Returns a module's syntax tree as text, without docstrings.

    >>> _bare("x = 1  # a comment") == _bare("x  =  1")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)
