"""`QuantPlan`: which format and algorithm each weight gets, decided before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quant.errors import FormatRefused, QuantizationError
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
        format: the weight's format.
        algorithm: the name of the algorithm that chooses its stored values.
        activation: how the program rounds the weight's inputs (`quant.formats.activations`).
    """

    format: WeightFormat
    algorithm: str
    activation: Activation = NONE

    def layout(self, rows: int, columns: int) -> dict[str, TensorLayout]:
        """The stored parts of a weight: the format's parts, and the static input scale if any."""
        parts = dict(self.format.layout(rows, columns))
        if self.activation == TENSOR:
            parts[INPUT_SCALE] = INPUT_SCALE_LAYOUT
        return parts

    def to_json(self) -> dict[str, str]:
        """The row of a plan's JSON; it has no activation when activations are not rounded."""
        row = {"format": self.format.name, "algorithm": self.algorithm}
        return row if self.activation == NONE else {**row, "activation": self.activation}


@dataclass(frozen=True)
class QuantPlan:
    """Every weight's assignment, by the weight's name in the program.

    Attributes:
        recipe: the name of the recipe that the user asked for.
        weights: the assignments; norms and other vectors are always ``fp32``.
        rotation: the name of the rotation that is applied to the weights before they are
            quantized; empty for none.
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
            QuantizationError: the data has another version or is not a plan.
        """
        if data.get("version") != PLAN_VERSION:
            raise QuantizationError(
                f"the plan has version {data.get('version')!r}; this EdgeForge reads {PLAN_VERSION}"
            )
        recipe, weights = data.get("recipe"), data.get("weights")
        if not isinstance(recipe, str) or not isinstance(weights, dict):
            raise QuantizationError(
                f"the plan needs a recipe's name and a mapping of weights; found recipe {recipe!r} "
                f"and weights of type {type(weights).__name__}"
            )
        rotation = data.get("rotation", "")
        if not isinstance(rotation, str):
            raise QuantizationError(f"the plan's rotation is {rotation!r}; it must be a name")
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
                    f"the plan assigns {row!r} to {name}; it must name a format and an algorithm"
                )
            activation = parse_activation(row.get("activation", NONE))
            assignments[name] = Assignment(
                parse_format(row["format"]), row["algorithm"], activation
            )
        return cls(recipe, assignments, rotation)

    def fingerprint(self) -> str:
        """A canonical text, equal for plans that give equal stores; it omits the recipe's name."""
        rows = {name: list(given.to_json().values()) for name, given in self.weights.items()}
        rotation = [self.rotation] if self.rotation else []
        return json.dumps([PLAN_VERSION, rows, *rotation], sort_keys=True)

    def bits_per_weight(
        self, shapes: Mapping[str, tuple[int, ...]], parameters: int | None = None
    ) -> float:
        """Mean stored bits per weight, with scales and norms included.

        Args:
            shapes: shape by weight name.
            parameters: the model's own number of weights, to divide by where the store holds some
                weights twice or holds added ones; None to divide by the number of stored weights.
        """
        stored = count = 0
        for name, assignment in self.weights.items():
            rows, columns = matrix_shape(shapes[name])
            stored += 8 * assignment.format.nbytes(rows, columns)
            count += rows * columns
        return stored / (parameters or count)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that each format can hold its weight, before any weight is read.

        Raises:
            QuantizationError: a group size does not divide the columns, a vector is to be
                quantized, or the plan and the model do not have the same weights.
        """
        strangers = sorted(self.weights.keys() ^ shapes.keys())
        if strangers:
            whose = "the plan" if strangers[0] in self.weights else "the model"
            raise QuantizationError(
                f"the plan belongs to another model: only {whose} has {strangers[0]}"
            )
        for name, assignment in self.weights.items():
            if len(shapes[name]) == 1 and is_quantized(assignment.format):
                raise FormatRefused(
                    f"{name} is a vector; only matrices are quantized",
                    f"keep it fp32, not {assignment.format.name}",
                )
            _check_scales(name, assignment)
            _check_activation(name, assignment)
            rows, columns = matrix_shape(shapes[name])
            assignment.format.check(name, rows, columns)

    def formats(self) -> dict[WeightFormat, list[str]]:
        """The names of the weights of each format, in the plan's order."""
        grouped: dict[WeightFormat, list[str]] = {}
        for name, assignment in self.weights.items():
            grouped.setdefault(assignment.format, []).append(name)
        return grouped


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns a shape as rows and columns; a vector is one row.

    >>> matrix_shape((4, 8)), matrix_shape((8,))
    ((4, 8), (1, 8))
    """
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def is_quantized(format: WeightFormat) -> bool:
    """Whether a format stores codes: integers or indices into a palette."""
    return not isinstance(format, FloatFormat)


def _check_scales(name: str, assignment: Assignment) -> None:
    """Refuses a scale dtype that no quantizer here produces.

    Raises:
        QuantizationError: the format has float16 scales, and the weight does not come quantized
            from the checkpoint.
    """
    format = assignment.format
    if (
        isinstance(format, IntFormat)
        and format.scale_dtype != "bfloat16"
        and assignment.algorithm != IMPORTED
    ):
        plain = replace(format, scale_dtype="bfloat16")
        raise FormatRefused(
            f"{name} is to be {format.name}; only weights imported from a quantized checkpoint "
            f"have float16 scales",
            f"use {plain.name}",
        )


def _check_activation(name: str, assignment: Assignment) -> None:
    """Refuses rounded activations where no kernel or no quantizer supports them.

    Raises:
        QuantizationError: the weight is not in an integer format, or its algorithm runs the
            quantized program, which needs the input scale before calibration has found it.
    """
    if assignment.activation != NONE and not isinstance(assignment.format, IntFormat):
        raise FormatRefused(
            f"{name} is to be {assignment.format.name} with activations rounded to "
            f"{assignment.activation}; only products with integer weights take rounded "
            f"activations",
            "use int8-pc, or activation none",
        )
    if assignment.activation == TENSOR and assignment.algorithm not in SCALES_INPUTS:
        raise FormatRefused(
            f"{name} is to be filled by {assignment.algorithm}, with activations rounded by "
            f"one scale ({TENSOR}); {assignment.algorithm} calibrates on the quantized program, "
            f"which needs that scale before it is known",
            f"use {' or '.join(SCALES_INPUTS)}, or activation {TOKEN}",
        )


def calibrated_weights(plan: QuantPlan) -> list[str]:
    """The weights that need calibration, for their algorithm or for their inputs' scale."""
    return [
        name
        for name, given in plan.weights.items()
        if is_calibrated(given.algorithm) or given.activation == TENSOR
    ]
