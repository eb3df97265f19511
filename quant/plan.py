"""`QuantPlan`: which format and algorithm each weight gets, decided before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quant.errors import QuantizationError
from quant.formats import FloatFormat, IntFormat, WeightFormat, parse_format

PLAN_VERSION = 1

IMPORTED = "imported"
"""The algorithm of weights whose integers and scales the checkpoint itself holds."""
SIGNED = "rtn-signed"
"""The data-free algorithm whose scales may be below zero, which not every runtime holds."""
POSITIVE = {SIGNED: "rtn", "gptq-signed": "gptq-order"}
"""Algorithms whose scales may be below zero, each with the one like it whose scales may not."""


@dataclass(frozen=True)
class Assignment:
    """One weight's format, and the algorithm that fills it (`quant.registry`)."""

    format: WeightFormat
    algorithm: str


@dataclass(frozen=True)
class QuantPlan:
    """Every weight's assignment, by program weight name.

    Attributes:
        recipe: what the user asked for.
        weights: the assignments; norms and other vectors are always ``fp32``.
    """

    recipe: str
    weights: Mapping[str, Assignment]

    def to_json(self) -> dict[str, object]:
        """The plan as a manifest holds it."""
        return {
            "version": PLAN_VERSION,
            "recipe": self.recipe,
            "weights": {
                name: {"format": a.format.name, "algorithm": a.algorithm}
                for name, a in self.weights.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> QuantPlan:
        """Reads what `to_json` wrote.

        Raises:
            QuantizationError: another version, or not a plan.
        """
        if data.get("version") != PLAN_VERSION:
            raise QuantizationError(
                f"the plan has version {data.get('version')!r}; this EdgeForge reads {PLAN_VERSION}"
            )
        recipe, weights = data.get("recipe"), data.get("weights")
        if not isinstance(recipe, str) or not isinstance(weights, dict):
            raise QuantizationError("the plan names no recipe or lists no weights")
        assignments = {}
        for name, row in weights.items():
            if (
                not isinstance(row, dict)
                or row.keys() != {"format", "algorithm"}
                or not all(isinstance(value, str) for value in row.values())
            ):
                raise QuantizationError(
                    f"the plan gives {name} {row!r}, not the names of a format and an algorithm"
                )
            assignments[name] = Assignment(parse_format(row["format"]), row["algorithm"])
        return cls(recipe, assignments)

    def fingerprint(self) -> str:
        """A canonical text: equal for plans that give equal stores (the recipe's name is out)."""
        rows = {n: [a.format.name, a.algorithm] for n, a in self.weights.items()}
        return json.dumps([PLAN_VERSION, rows], sort_keys=True)

    def bits_per_weight(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Stored bits over all weights, scales and norms included, divided by their number."""
        stored = parameters = 0
        for name, assignment in self.weights.items():
            rows, columns = matrix_shape(shapes[name])
            stored += 8 * assignment.format.nbytes(rows, columns)
            parameters += rows * columns
        return stored / parameters

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that each format can hold its weight, before anything is read.

        Raises:
            QuantizationError: a group size that does not divide; a vector in integers; weights
                that the plan or the model lacks.
        """
        strangers = sorted(self.weights.keys() ^ shapes.keys())
        if strangers:
            whose = "the plan" if strangers[0] in self.weights else "the model"
            raise QuantizationError(f"the plan is another model's: only {whose} has {strangers[0]}")
        for name, assignment in self.weights.items():
            if len(shapes[name]) == 1 and is_quantized(assignment.format):
                raise QuantizationError(
                    f"{name} is a vector; only matrices are quantized: keep it fp32, not "
                    f"{assignment.format.name}"
                )
            _check_scales(name, assignment)
            rows, columns = matrix_shape(shapes[name])
            assignment.format.check(name, rows, columns)

    def formats(self) -> dict[WeightFormat, list[str]]:
        """Weight names by format, in the plan's order."""
        grouped: dict[WeightFormat, list[str]] = {}
        for name, assignment in self.weights.items():
            grouped.setdefault(assignment.format, []).append(name)
        return grouped


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns: a vector is one row.

    >>> matrix_shape((4, 8)), matrix_shape((8,))
    ((4, 8), (1, 8))
    """
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def is_quantized(format: WeightFormat) -> bool:
    """Whether a format holds codes, of integers or of a palette."""
    return not isinstance(format, FloatFormat)


def _check_scales(name: str, assignment: Assignment) -> None:
    """Refuses scales that no quantizer here makes.

    Raises:
        QuantizationError: float16 scales of a weight that was not quantized elsewhere.
    """
    format = assignment.format
    if (
        isinstance(format, IntFormat)
        and format.scale_dtype != "bfloat16"
        and assignment.algorithm != IMPORTED
    ):
        plain = replace(format, scale_dtype="bfloat16")
        raise QuantizationError(
            f"{name} is to be {format.name}, whose scales only checkpoints bring that were "
            f"quantized elsewhere: use {plain.name}"
        )


FLOAT32 = FloatFormat("float32")
