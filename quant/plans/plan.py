"""`QuantPlan`: which format and algorithm each weight gets, decided before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quant.errors import QuantizationError
from quant.formats.activations import (
    INPUT_SCALE,
    INPUT_SCALE_LAYOUT,
    NONE,
    TENSOR,
    TOKEN,
    Activation,
    parse_activation,
)
from quant.formats.formats import (
    FloatFormat,
    IntFormat,
    TensorLayout,
    WeightFormat,
    parse_format,
)
from quant.plans.algorithms import IMPORTED, SCALES_INPUTS, is_calibrated

PLAN_VERSION = 1
FLOAT32 = FloatFormat("float32")


@dataclass(frozen=True)
class Assignment:
    """One weight's format, and the algorithm that fills it (`quant.quantizers.registry`).

    Attributes:
        format: of the weight.
        algorithm: what chooses its integers.
        activation: what happens to what it is multiplied by (`quant.formats.activations`).
    """

    format: WeightFormat
    algorithm: str
    activation: Activation = NONE

    def layout(self, rows: int, columns: int) -> dict[str, TensorLayout]:
        """The stored parts of a weight: the format's, and the scale of what enters it."""
        parts = dict(self.format.layout(rows, columns))
        if self.activation == TENSOR:
            parts[INPUT_SCALE] = INPUT_SCALE_LAYOUT
        return parts

    def to_json(self) -> dict[str, str]:
        """As a plan holds it; what a plan of weights alone does not need is left out."""
        row = {"format": self.format.name, "algorithm": self.algorithm}
        return row if self.activation == NONE else {**row, "activation": self.activation}


@dataclass(frozen=True)
class QuantPlan:
    """Every weight's assignment, by program weight name.

    Attributes:
        recipe: what the user asked for.
        weights: the assignments; norms and other vectors are always ``fp32``.
        rotation: what the weights are rotated by before they are quantized, empty for nothing.
    """

    recipe: str
    weights: Mapping[str, Assignment]
    rotation: str = ""

    def to_json(self) -> dict[str, object]:
        """The plan as a manifest holds it."""
        return {
            "version": PLAN_VERSION,
            "recipe": self.recipe,
            **({"rotation": self.rotation} if self.rotation else {}),
            "weights": {name: given.to_json() for name, given in self.weights.items()},
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
        rotation = data.get("rotation", "")
        if not isinstance(rotation, str):
            raise QuantizationError(f"the plan has the rotation {rotation!r}, which is no name")
        assignments = {}
        for name, row in weights.items():
            if (
                not isinstance(row, dict)
                or not {"format", "algorithm"}
                <= row.keys()
                <= {"format", "algorithm", "activation"}
                or not all(isinstance(value, str) for value in row.values())
            ):
                raise QuantizationError(
                    f"the plan gives {name} {row!r}, not the names of a format and an algorithm"
                )
            activation = parse_activation(row.get("activation", NONE))
            assignments[name] = Assignment(
                parse_format(row["format"]), row["algorithm"], activation
            )
        return cls(recipe, assignments, rotation)

    def fingerprint(self) -> str:
        """A canonical text: equal for plans that give equal stores (the recipe's name is out)."""
        rows = {name: list(given.to_json().values()) for name, given in self.weights.items()}
        rotation = [self.rotation] if self.rotation else []
        return json.dumps([PLAN_VERSION, rows, *rotation], sort_keys=True)

    def bits_per_weight(
        self, shapes: Mapping[str, tuple[int, ...]], parameters: int | None = None
    ) -> float:
        """Stored bits over all weights, scales and norms included, divided by their number.

        Args:
            shapes: by weight.
            parameters: the model's own number of weights, where some are stored twice or added.
        """
        stored = count = 0
        for name, assignment in self.weights.items():
            rows, columns = matrix_shape(shapes[name])
            stored += 8 * assignment.format.nbytes(rows, columns)
            count += rows * columns
        return stored / (parameters or count)

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
            _check_activation(name, assignment)
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


def _check_activation(name: str, assignment: Assignment) -> None:
    """Refuses to round what enters a weight where no kernel or no quantizer has use for it.

    Raises:
        QuantizationError: a weight that is not in integers; an algorithm that needs the scale of
            its inputs before there is one.
    """
    if assignment.activation != NONE and not isinstance(assignment.format, IntFormat):
        raise QuantizationError(
            f"{name} is to be {assignment.format.name} with activations rounded "
            f"({assignment.activation}); they are rounded for products with integers only: use "
            f"int8-pc, or activation none"
        )
    if assignment.activation == TENSOR and assignment.algorithm not in SCALES_INPUTS:
        raise QuantizationError(
            f"{name} is to be filled by {assignment.algorithm}, with activations rounded by "
            f"one scale ({TENSOR}); that scale is found on the float program, before "
            f"{assignment.algorithm} runs the quantized one: use {' or '.join(SCALES_INPUTS)}, "
            f"or activation {TOKEN}"
        )


def calibrated_weights(plan: QuantPlan) -> list[str]:
    """The weights of a plan whose quantizers, or the scales of whose inputs, need calibration."""
    return [
        name
        for name, given in plan.weights.items()
        if is_calibrated(given.algorithm) or given.activation == TENSOR
    ]
