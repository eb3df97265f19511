"""Checks a plan, and says in a refusal only what every chosen target accepts instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from edgeforge.families.assembly import EMBEDDING
from exporters.errors import ExportError, MemoryRefused
from exporters.options import TargetOptions
from exporters.target import ModelFacts, Target
from quant.errors import FormatRefused, QuantizationError, Refusal
from quant.formats.activations import ACTIVATIONS, NONE, TENSOR, TOKEN
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat, parse_format
from quant.plans.algorithms import CAST, IMPORTED, POSITIVE, algorithms_for
from quant.plans.plan import FLOAT32, Assignment, QuantPlan, matrix_shape

# Narrower groups take more bytes for scales than 8-bit integers take.
_LEAST_GROUP: Final = 8
_MOST_GROUP: Final = 256
_SAFE: Final = ("int8-pc", "fp16", "fp32")
_RECIPES: Final = {TOKEN: "w8a8", TENSOR: "w8a8-static"}


@dataclass(frozen=True)
class PlanCheck:
    """Asks a plan's own check, and that of every chosen target, about single weights.

    Attributes:
        shapes: each weight's shape.
        targets: the targets that must hold the plan.
        facts: the model's facts; only targets need them.
        options: the targets' options.
    """

    shapes: Mapping[str, tuple[int, ...]]
    targets: Sequence[Target]
    facts: ModelFacts | None
    options: TargetOptions

    def run(self, plan: QuantPlan) -> None:
        """Refuses a plan that cannot be held; a limit on memory is not looked at.

        Raises:
            QuantizationError: a format cannot hold its weight.
            ExportError: a target cannot hold a format.
        """
        try:
            self._ask(plan.weights)
        except Refusal as error:
            raise self._advice(plan) or error from error

    def run_alone(self, name: str, given: Assignment) -> None:
        """Refuses one weight's assignment that cannot be held.

        Raises:
            QuantizationError: the format cannot hold the weight.
            ExportError: a target cannot hold the format.
        """
        self._ask({name: given})

    def beyond_range(self, error: FormatRefused, plan: QuantPlan) -> FormatRefused:
        """Returns the refusal of a value that only float32 holds, with advice that targets accept.

        Args:
            error: the refusal as quantizing raised it.
            plan: the plan that was carried out.
        """
        wide = {EMBEDDING: Assignment(FLOAT32, CAST)}
        rounded = any(given.activation != NONE for given in plan.weights.values())
        ways = ["fp32", *(["activation none"] if rounded else [])]
        if not self._holds(wide):
            ways += self._options(wide)
        return FormatRefused(error.problem, f"keep it {' with '.join(ways)}")

    def refusal(self, given: Mapping[str, Assignment]) -> Refusal | None:
        """Returns why some weights cannot have their assignments; None where they can."""
        try:
            self._ask(given)
        except Refusal as error:
            return error
        return None

    def _ask(self, given: Mapping[str, Assignment]) -> None:
        shapes = {name: self.shapes[name] for name in given}
        plan = QuantPlan("checked", given)
        plan.check(shapes)
        if self.facts is None:
            return
        # Targets look at the embedding's size.
        if EMBEDDING not in given:
            plan = QuantPlan(
                "checked", {EMBEDDING: Assignment(FloatFormat("float16"), CAST), **given}
            )
            shapes = {EMBEDDING: self.shapes[EMBEDDING], **shapes}
        free = replace(self.options, max_memory=None)
        for target in self.targets:
            target.check(plan, shapes, self.facts, free.only(target.options))

    def _advice(self, plan: QuantPlan) -> Refusal | None:
        """Returns what is wrong with a plan's first weight, and what to do about every such weight.

        None where no single weight is at fault.
        """
        kinds: dict[tuple[Assignment, tuple[int, ...]], list[str]] = {}
        for name, given in plan.weights.items():
            kinds.setdefault((given, self.shapes[name]), []).append(name)
        error, groups = None, dict[str, list[str]]()
        for (given, _), names in kinds.items():
            refusal = self.refusal({names[0]: given})
            if refusal is not None:
                error = error or refusal
                groups.setdefault(_listed(self._ways(names[0], given)), []).extend(names)
        if error is None or "" in groups:
            return None
        (ways, names), *others = groups.items()
        also = f", and the same for {_named(names[1:])}" if names[1:] else ""
        rest = "".join(f"; for {_named(names)}, {ways}" for ways, names in others)
        return type(error)(error.problem, f"{ways}{also}{rest}")

    def _ways(self, name: str, given: Assignment) -> list[str]:
        """Returns what to do about a weight, in words, that all targets accept."""
        if given.algorithm == IMPORTED:
            return self._ways_of_imported(name, given)
        rows, columns = matrix_shape(self.shapes[name])
        ways = []
        near = next(self._accepted(name, _near(given, rows, columns)), None)
        if near is not None:
            ways.append(_words(given, near))
        safe = next(self._accepted(name, _safe(given)), None)
        if safe is not None and safe != near:
            ways.append(_words(given, safe))
        return ways + [f"use {option}" for option in self._options({name: given})]

    def _accepted(self, name: str, ways: Iterator[Assignment]) -> Iterator[Assignment]:
        return (way for way in ways if self._holds({name: way}))

    def _holds(self, given: Mapping[str, Assignment]) -> bool:
        try:
            self._ask(given)
        except (QuantizationError, ExportError):
            return False
        return True

    def _options(self, weights: Mapping[str, Assignment]) -> list[str]:
        """Returns the options under which the weights could stay as they are."""
        asked, found = self.options, {}
        if asked.profile is not None:
            found["--profile gpu"] = replace(asked, profile="gpu")
        if asked.opset is not None:
            found["--opset ios18"] = replace(asked, opset="ios18")
        if asked.backend is not None:
            found["--backend xnnpack"] = replace(asked, backend="xnnpack")
        return [text for text, way in found.items() if replace(self, options=way)._holds(weights)]

    def _ways_of_imported(self, name: str, given: Assignment) -> list[str]:
        if isinstance(given.format, IntFormat):
            rounded = replace(given, format=replace(given.format, scale_dtype="bfloat16"))
            if rounded != given and self._holds({name: rounded}):
                return [
                    "round them with --imported-scales bfloat16, which keeps the integers and "
                    "changes no scale by more than 0.2 %"
                ]
        return [
            "give the original checkpoint, whose weights can get another format",
            *(f"use {option}" for option in self._options({name: given})),
        ]


def check_targets(
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    targets: Sequence[Target],
    facts: ModelFacts,
    options: TargetOptions,
) -> None:
    """Refuses a plan that a target cannot hold, or a context that does not fit the memory.

    Where the memory of several targets does not suffice, the message is the one whose context fits
    all of them.

    Raises:
        ExportError: a target cannot hold the plan.
    """
    refused = []
    for target in targets:
        try:
            target.check(plan, shapes, facts, options.only(target.options))
        except MemoryRefused as error:
            refused.append(error)
    if refused:
        raise min(refused, key=lambda error: error.largest)


def _listed(ways: Sequence[str]) -> str:
    """Returns alternatives in words.

    >>> _listed(["use fp16"]), _listed(["a", "b"]), _listed(["a", "b", "c"])
    ('use fp16', 'a or b', 'a, b, or c')
    """
    return " or ".join(ways) if len(ways) < 3 else f"{', '.join(ways[:-1])}, or {ways[-1]}"


def _named(names: Sequence[str]) -> str:
    """Returns the first of some weights' names and how many more there are."""
    more = len(names) - 1
    return names[0] + (f" and {more} more" if more else "")


def _words(given: Assignment, way: Assignment) -> str:
    """Returns how a user asks for an assignment in place of the given one."""
    parts = []
    if way.format != given.format:
        parts.append(way.format.name)
    if way.activation != given.activation:
        recipe = _RECIPES.get(way.activation)
        as_in = "" if recipe is None else f" (as recipe {recipe} does)"
        parts.append(f"activation {way.activation}{as_in}")
    named = given.algorithm != algorithms_for(given.format)[0]
    if named and way.algorithm not in (given.algorithm, CAST):
        parts.append(f"algorithm {way.algorithm}")
    verb = "keep it" if parts[0] in _SAFE else "use"
    return f"{verb} {' with '.join(parts)}"


def _near(given: Assignment, rows: int, columns: int) -> Iterator[Assignment]:
    """Yields assignments that are most like the given one, the nearest first."""
    if given.algorithm in POSITIVE:
        yield replace(given, algorithm=POSITIVE[given.algorithm])
    for activation in ACTIVATIONS:
        if NONE not in (activation, given.activation) and activation != given.activation:
            yield from _filled(given, given.format, activation)
    format = given.format
    if isinstance(format, FloatFormat):
        for name in ("fp16", "fp32"):
            yield from _filled(given, parse_format(name), NONE)
        return
    for activation in dict.fromkeys((given.activation, NONE)):
        for other in _like(format, rows, columns):
            yield from _filled(given, other, activation)


def _like(format: WeightFormat, rows: int, columns: int) -> Iterator[WeightFormat]:
    if isinstance(format, PaletteFormat):
        yield from _palettes(format.bits, format.rows_per_group, rows)
        bits, size, symmetric = 4 if format.bits <= 4 else 8, 32, True
        yield from _integers(bits, _group_sizes(size, columns), symmetric)
        yield from _integers(bits, [None], symmetric)
    elif isinstance(format, IntFormat):
        sizes = _group_sizes(format.group_size, columns)
        palettes = list(_palettes(format.bits, 16, rows))
        # One scale a row is the least exact, so palettes come first where there were groups.
        row = [None] if format.group_size is None else []
        wider = 4 if format.bits < 4 else 8
        yield from _integers(format.bits, [*row, *sizes], format.symmetric)
        yield from (palette for palette in palettes if palette.bits == format.bits)
        yield from _integers(format.bits, [None], format.symmetric)
        if wider == 4:
            yield from _integers(wider, [*row, *sizes, None], format.symmetric)
        yield from palettes
        yield from _integers(wider, [*row, *sizes], format.symmetric)
        if format.bits == 8:
            yield from _integers(4, sizes, symmetric=True)


def _group_sizes(group_size: int | None, columns: int) -> list[int]:
    """Returns the group sizes that divide the columns: narrower ones by size, then wider ones."""
    sizes = [n for n in range(_LEAST_GROUP, _MOST_GROUP + 1, _LEAST_GROUP) if columns % n == 0]
    most = group_size or 32
    return [n for n in reversed(sizes) if n <= most] + [n for n in sizes if n > most]


def _integers(bits: int, sizes: Sequence[int | None], symmetric: bool) -> Iterator[IntFormat]:
    """Yields integer formats; all without zero points before all with, or the other way round."""
    for kind in (symmetric, not symmetric):
        for size in sizes:
            groups = "pc" if size is None else f"g{size}"
            try:
                format = parse_format(f"int{bits}-{groups}" + ("" if kind else "-asym"))
            except QuantizationError:
                continue  # a group's codes do not fill whole bytes
            assert isinstance(format, IntFormat)
            yield format


def _palettes(bits: int, rows_per_group: int | None, rows: int) -> Iterator[PaletteFormat]:
    most = rows_per_group or 16
    sizes = [size for size in range(most, 3, -1) if rows % size == 0]
    for wide in (2, 3, 4, 6, 8):
        for groups in (*(f"gc{size}" for size in sizes), "pt"):
            if wide >= bits:
                format = parse_format(f"lut{wide}-{groups}")
                assert isinstance(format, PaletteFormat)
                yield format


def _safe(given: Assignment) -> Iterator[Assignment]:
    """Yields what hardly costs accuracy: 8-bit integers, then floats."""
    for name in _SAFE:
        for activation in dict.fromkeys((given.activation, NONE)):
            yield from _filled(given, parse_format(name), activation)


def _filled(given: Assignment, format: WeightFormat, activation: str) -> Iterator[Assignment]:
    """Yields a format with the given algorithm where it can fill it, and with the usual one."""
    able = algorithms_for(format)
    usual = given.algorithm == algorithms_for(given.format)[0]
    named = [] if usual else [given.algorithm, POSITIVE.get(given.algorithm, "")]
    for name in (*(name for name in named if name in able), able[0]):
        yield Assignment(format, name, activation)  # type: ignore[arg-type]
