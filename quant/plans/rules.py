"""Rules that give weights formats and algorithms, and the recipe that a list of them makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quant.errors import QuantizationError
from quant.formats.activations import NONE, Activation
from quant.formats.formats import FloatFormat, WeightFormat, parse_format
from quant.plans.algorithms import CAST
from quant.plans.plan import FLOAT32, Assignment, QuantPlan, is_quantized, matrix_shape
from quant.suggestion import did_you_mean, nearest

_WILDCARDS = frozenset("*?[")
_ROLES = ("*", "head", "embedding", "linear")


@dataclass(frozen=True)
class Rule:
    """One rule: weights that match a pattern or a role get a format and an algorithm.

    Attributes:
        match: shell pattern of weight names, or a role.
        format: a format's name, or several names separated by ``|``: each weight gets the first
            format whose groups divide its columns.
        algorithm: a name of `quant.quantizers.registry`; None for each format's default. An
            embedding that is not also the head has no inputs to calibrate on, so it gets the
            default in place of a calibrated algorithm.
        optional: whether the rule may match no weight. Rules from a file may not: there, a rule
            without a match is a mistake.
        activation: how the weights' inputs are rounded (`quant.formats.activations`). An embedding
            that is not also the head takes tokens and has no such inputs.
    """

    match: str
    format: str
    algorithm: str | None = None
    optional: bool = False
    activation: Activation = NONE

    def formats(self) -> list[WeightFormat]:
        """The formats in order of preference.

        Raises:
            QuantizationError: one of the names is not a format's name.
        """
        return [parse_format(part.strip()) for part in self.format.split("|")]


@dataclass(frozen=True)
class Recipe:
    """Rules in order: the first rule that matches a matrix decides.

    Attributes:
        name: the recipe's name on the command line.
        about: a description of one line.
        rules: the rules; the last one should match every weight that is left.
        rotation: the name of the rotation that the recipe's file asks for, or None.
    """

    name: str
    about: str
    rules: tuple[Rule, ...]
    rotation: str | None = None

    def variants(self) -> tuple[Recipe, ...]:
        """Recipes to prefer to this one where all targets hold their plans, the best first."""
        return ()

    def rules_for(
        self, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]
    ) -> tuple[Rule, ...]:
        """Returns the rules for a model; a recipe may make them of its shapes.

        Args:
            shapes: shape by weight name.
            roles: role by weight name.
        """
        return self.rules

    def plan(self, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]) -> QuantPlan:
        """Returns the plan for a model.

        Args:
            shapes: shape by weight name.
            roles: ``embedding``, ``linear``, ``head``, ``norm``, ``bias``, ``conv`` or
                ``router`` by weight name; rules may name a role instead of a pattern. Vectors,
                convolutions and routers are float32 whatever the rules say.

        Raises:
            QuantizationError: no rule matches a matrix, a rule matches nothing, or a rule names
                an unknown algorithm.
        """
        rules = self.rules_for(shapes, roles)
        for asked in rules:
            self._check_algorithm(asked)
        first = _first_match(rules)
        weights: dict[str, Assignment] = {}
        used: set[Rule] = set()
        tied = "head" not in roles.values()
        for name, shape in shapes.items():
            if stays_float32(shape, roles[name]):
                weights[name] = Assignment(FLOAT32, CAST)
                continue
            rule = first(name, roles[name])
            if rule is None:
                raise QuantizationError(
                    f"recipe {self.name} has no rule for {name}: end it with a rule for '*'"
                )
            used.add(rule)
            chosen = self._choose_format(rule, name, shape)
            if roles[name] == "norm":
                weights[name] = norm_matrix(chosen)
                continue
            looked_up = roles[name] == "embedding" and not tied
            weights[name] = Assignment(
                chosen, _algorithm(rule, chosen, looked_up), NONE if looked_up else rule.activation
            )
        for rule in rules:
            if rule not in used and not rule.optional and rule.match not in _ROLES:
                self._refuse_unused(rule, shapes)
        return QuantPlan(self.name, weights)

    def _choose_format(self, rule: Rule, name: str, shape: tuple[int, ...]) -> WeightFormat:
        """The first of the rule's formats that can hold the weight, else the last of them.

        `QuantPlan.check` refuses the last one where it does not fit either.
        """
        first, *others = rule.formats()
        for other in others:
            try:
                first.check(name, *matrix_shape(shape))
                break
            except QuantizationError:
                first = other
        return first

    def _check_algorithm(self, rule: Rule) -> None:
        from quant.plans.algorithms import algorithms_for, known_algorithms

        if rule.algorithm is None:
            return
        known = known_algorithms()
        if rule.algorithm not in known:
            hint = did_you_mean(rule.algorithm, known)
            raise QuantizationError(
                f"recipe {self.name}: there is no algorithm {rule.algorithm!r}{hint}; known: "
                f"{', '.join(known)}"
            )
        for format in rule.formats():
            able = algorithms_for(format)
            if is_quantized(format) and rule.algorithm not in able:
                raise QuantizationError(
                    f"recipe {self.name}: algorithm {rule.algorithm} cannot fill {format.name}, "
                    f"which rule {rule.match!r} asks for: use {' or '.join(able)}, or leave the "
                    f"algorithm out"
                )

    def _refuse_unused(self, rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> None:
        matched = [name for name in shapes if fnmatchcase(name, rule.match)]
        if matched:
            hint = f": put it before the rule that {matched[0]} already has"
        else:
            # The number of another layer is not a misspelt one.
            numbers = set(re.findall(r"\d+", rule.match))
            alike = [name for name in shapes if numbers <= set(re.findall(r"\d+", name))]
            near = nearest(rule.match, alike)
            hint = "" if near is None else f"; did you mean {near!r}?"
        raise QuantizationError(
            f"recipe {self.name}: the rule {rule.match!r} matches no weight that earlier rules "
            f"leave{hint}"
        )


def stays_float32(shape: tuple[int, ...], role: str) -> bool:
    """Whether a weight is float32 whatever a recipe says.

    Vectors, convolutions and the numbers of a recurrence are small. A router is, too, and a small
    error of it sends a token to another expert; one of a gate's products changes how long a
    recurrence remembers.

    >>> stays_float32((8, 3), "conv"), stays_float32((8,), "bias"), stays_float32((8, 8), "linear")
    (True, True, False)
    """
    return len(shape) == 1 or role in ("conv", "router", "gain", "gate")


def norm_matrix(format: WeightFormat | None = None) -> Assignment:
    """Returns the assignment of a matrix that stands in the place of a norm's scale.

    It is a float format, float16 unless the recipe names one. Such a matrix is close to a multiple
    of the identity: integers would spend their range on the diagonal.
    """
    return Assignment(format if isinstance(format, FloatFormat) else FloatFormat("float16"), CAST)


def _first_match(rules: Sequence[Rule]) -> Callable[[str, str], Rule | None]:
    """Returns what finds the first rule that matches a weight's name or role.

    Rules without a wildcard are looked up: there may be one for each of thousands of matrices.
    """
    exact: dict[str, int] = {}
    patterns = []
    for index, rule in enumerate(rules):
        if _WILDCARDS.isdisjoint(rule.match):
            exact.setdefault(rule.match, index)
        else:
            patterns.append((index, rule.match))

    def first(name: str, role: str) -> Rule | None:
        found = min((exact[each] for each in (name, role) if each in exact), default=len(rules))
        for index, pattern in patterns:
            if index > found:
                break
            if fnmatchcase(name, pattern):
                found = index
                break
        return rules[found] if found < len(rules) else None

    return first


def _algorithm(rule: Rule, format: WeightFormat, only_looked_up: bool) -> str:
    from quant.plans.algorithms import algorithms_for, is_calibrated

    usual = algorithms_for(format)[0]
    if rule.algorithm is None or not is_quantized(format):
        return usual
    return usual if only_looked_up and is_calibrated(rule.algorithm) else rule.algorithm
