"""Recipes: ordered rules that give weights formats, named on the command line or read from YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from quant.errors import QuantizationError
from quant.formats.activations import NONE, TENSOR, TOKEN, Activation, parse_activation
from quant.formats.formats import FloatFormat, WeightFormat, parse_format
from quant.input_files import read_input
from quant.plans.algorithms import CAST, SIGNED
from quant.plans.plan import FLOAT32, Assignment, QuantPlan, is_quantized, matrix_shape
from quant.quoted import quoted
from quant.suggestion import did_you_mean, nearest
from quant.yaml_input import YamlError, parse_yaml

LARGEST_RECIPE = 1 << 20
"""The most bytes of a file of rules; one rule for each weight of a large model takes a tenth."""
_LONGEST_TEXT = 500
_ROLES = ("*", "head", "embedding", "linear")
OUTER = "outer"
"""The layers that a rule may be limited to: the first eighth and the last eighth, at least one."""


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
        layers: `OUTER` to match weights of the outer layers alone; None for all weights.
    """

    match: str
    format: str
    algorithm: str | None = None
    optional: bool = False
    activation: Activation = NONE
    layers: str | None = None

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
        finer: whether 4-bit weights take scales of either sign, or else zero points, where all
            targets hold them.
    """

    name: str
    about: str
    rules: tuple[Rule, ...]
    rotation: str | None = None
    finer: bool = False

    def plan(self, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]) -> QuantPlan:
        """Returns the plan for a model.

        Args:
            shapes: shape by weight name.
            roles: ``embedding``, ``linear``, ``head`` or ``norm`` by weight name; rules may name
                a role instead of a pattern.

        Raises:
            QuantizationError: no rule matches a matrix, a rule matches nothing, or a rule names
                an unknown algorithm.
        """
        for asked in self.rules:
            self._check_algorithm(asked)
        weights: dict[str, Assignment] = {}
        used: set[Rule] = set()
        tied = "head" not in roles.values()
        outer = _outer_layers(shapes)
        for name, shape in shapes.items():
            if len(shape) == 1:
                weights[name] = Assignment(FLOAT32, CAST)
                continue
            rules = (rule for rule in self.rules if rule.layers is None or _layer(name) in outer)
            rule = next((r for r in rules if _matches(r, name, roles[name])), None)
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
        for rule in self.rules:
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


def norm_matrix(format: WeightFormat | None = None) -> Assignment:
    """Returns the assignment of a matrix that stands in the place of a norm's scale.

    It is a float format, float16 unless the recipe names one. Such a matrix is close to a multiple
    of the identity: integers would spend their range on the diagonal.
    """
    return Assignment(format if isinstance(format, FloatFormat) else FloatFormat("float16"), CAST)


def _layer(name: str) -> int | None:
    """Returns the number of a weight's layer.

    >>> _layer("model.layers.12.mlp.down_proj.weight"), _layer("lm_head.weight")
    (12, None)
    """
    found = re.search(r"\blayers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _outer_layers(names: Iterable[str]) -> frozenset[int]:
    """Returns the numbers of the first and of the last eighth of the layers, at least one each."""
    count = max((layer for name in names if (layer := _layer(name)) is not None), default=-1) + 1
    share = max(1, count // 8)
    return frozenset(n for n in range(count) if n < share or n >= count - share)


def _matches(rule: Rule, name: str, role: str) -> bool:
    return rule.match == role or fnmatchcase(name, rule.match)


def _algorithm(rule: Rule, format: WeightFormat, only_looked_up: bool) -> str:
    from quant.plans.algorithms import algorithms_for, is_calibrated

    usual = algorithms_for(format)[0]
    if rule.algorithm is None or not is_quantized(format):
        return usual
    return usual if only_looked_up and is_calibrated(rule.algorithm) else rule.algorithm


def _uniform(name: str, format: str, about: str, algorithm: str | None = None) -> Recipe:
    return Recipe(name, about, (Rule("*", format, algorithm),))


# Measured on three models, of which one is real (docs/recipes.md): rounding costs most in the
# values' projection, then in the first layer and in the down projections of the outer layers, and
# least in the gate and up projections, where wider groups save bits.
_INT4 = Recipe(
    "int4",
    "4 bits in groups of 32 and 64; 8 bits for values, the first layer and outer down projections",
    (
        Rule("*.v_proj.*", "int8-pc", optional=True),
        Rule("model.layers.0.*", "int8-pc", optional=True),
        Rule("*.down_proj.*", "int8-pc", optional=True, layers=OUTER),
        Rule("*.gate_up_proj.*", "int4-g64 | int4-g32", optional=True),
        Rule("*", "int4-g32"),
    ),
    finer=True,
)


def _int4_by(name: str, algorithm: str, about: str) -> Recipe:
    rules = tuple(replace(rule, algorithm=algorithm) for rule in _INT4.rules)
    return replace(_INT4, name=name, about=about, rules=rules)


def _rounded(name: str, activation: Activation, algorithm: str, about: str) -> Recipe:
    """SmoothQuant in the layers only, as in its paper: the head's inputs are not rounded."""
    rules = (
        Rule("embedding", "int8-pc"),
        Rule("head", "int8-pc"),
        Rule("*", "int8-pc", algorithm, activation=activation),
    )
    return Recipe(name, about, rules)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _INT4,
        _uniform("int4-g32", "int4-g32", "4 bits, groups of 32: 4.5 bits a weight"),
        _uniform("int4-g64", "int4-g64", "4 bits, groups of 64: 4.25 bits a weight"),
        _uniform("int4-g128", "int4-g128", "4 bits, groups of 128: 4.125 bits, the fastest"),
        _int4_by("int4-gptq", "gptq-order", "the formats of int4, by GPTQ on a calibration text"),
        _int4_by("int4-awq", "awq", "the formats of int4, by AWQ on a calibration text"),
        _uniform("int4-g128-gptq", "int4-g128", "4 bits, groups of 128, by GPTQ", "gptq-order"),
        _uniform("int4-g128-awq", "int4-g128", "4 bits, groups of 128, by AWQ", "awq"),
        _uniform(
            "int4-g32-signed",
            "int4-g32",
            "4 bits, groups of 32 with scales of either sign: more exact at the same size",
            SIGNED,
        ),
        _uniform(
            "int4-g64-signed", "int4-g64", "4 bits, groups of 64, scales of either sign", SIGNED
        ),
        _uniform(
            "int4-g128-signed", "int4-g128", "4 bits, groups of 128, scales of either sign", SIGNED
        ),
        _uniform("int4-g32-asym", "int4-g32-asym", "4 bits with zero points, groups of 32"),
        _uniform("int4-g64-asym", "int4-g64-asym", "4 bits with zero points, groups of 64"),
        _uniform("int4-g128-asym", "int4-g128-asym", "4 bits with zero points, groups of 128"),
        _uniform("int4-pc", "int4-pc", "4 bits, one scale a row: the smallest, the least exact"),
        _uniform("int8", "int8-pc", "8 bits, one scale a row"),
        _rounded("w8a8", TOKEN, "smoothquant", "int8, inputs rounded per token: ONNX, ExecuTorch"),
        # One scale for all tokens suffers more from outliers: there the searched exponent paid.
        _rounded(
            "w8a8-static",
            TENSOR,
            "smoothquant-search",
            "int8, inputs rounded by fixed scales: ONNX, Core ML",
        ),
        _uniform("int8-g32", "int8-g32", "8 bits, groups of 32"),
        _uniform("int8-g128", "int8-g128", "8 bits, groups of 128"),
        _uniform(
            "int2-g32-signed", "int2-g32", "2 bits, groups of 32, scales of either sign", SIGNED
        ),
        *(
            _uniform(
                f"int{bits}-g{group}-signed-gptq",
                f"int{bits}-g{group}",
                f"{bits} bits, groups of {group}, scales of either sign, by GPTQ",
                "gptq-signed",
            )
            for bits, group in ((4, 32), (4, 128), (2, 32), (2, 64))
        ),
        _uniform("lut4", "lut4-gc16", "palettes of 16 values, each for 16 rows"),
        _uniform("lut6", "lut6-gc16", "palettes of 64 values, each for 16 rows"),
        _uniform("lut8", "lut8-gc16", "palettes of 256 values, each for 16 rows"),
        _uniform("lut3", "lut3-gc16", "palettes of 8 values, each for 16 rows"),
        _uniform("lut2", "lut2-gc16", "palettes of 4 values, each for 16 rows"),
        *(
            _uniform(
                f"lut{bits}-weighted",
                f"lut{bits}-gc16",
                f"palettes of {2**bits} values, weighted by the inputs on a calibration text",
                "kmeans-weighted",
            )
            for bits in (4, 3, 2)
        ),
        *(
            _uniform(
                f"lut{bits}-gptq",
                f"lut{bits}-gc16",
                f"palettes of {2**bits} values, by GPTQ on a calibration text",
                "gptq-order",
            )
            for bits in (4, 3, 2)
        ),
        _uniform("fp16", "fp16", "float16 weights, float32 arithmetic: the lossless baseline"),
        _uniform("fp32", "fp32", "float32 weights"),
    )
}


def find_recipe(name: str, others: Iterable[str] = ()) -> Recipe:
    """Returns a recipe by its name, or reads it from a YAML file of rules.

    The file holds a list of ``{match: PATTERN, format: NAME, algorithm: NAME, activation: NAME,
    layers: outer}``, where ``algorithm``, ``activation`` and ``layers`` may be left out. Or it
    holds a mapping with that list under ``rules`` and, optionally, a rotation's name under
    ``rotation``.

    Args:
        name: the recipe's name or the file's path.
        others: further names that the caller accepts, to list in the message.

    Raises:
        QuantizationError: the name is neither a known recipe nor a file that holds rules.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _read_recipe(path)
    known = [*RECIPES, *others]
    hint = did_you_mean(name, known)
    raise QuantizationError(
        f"there is no recipe {name!r}{hint}; known: {', '.join(known)}, or a .yaml file of rules"
    )


def _read_recipe(path: Path) -> Recipe:
    rows, rotation = _read_rules(path)
    fields = {"match", "format", "algorithm", "activation", "layers"}
    rules = []
    for number, row in enumerate(rows, start=1):
        where = f"recipe {path}: rule {number}"
        if not isinstance(row, dict) or not {"match", "format"} <= set(row) <= fields:
            raise QuantizationError(
                f"{where} must have match and format, and may have algorithm, activation and "
                f"layers; found {quoted(row)}"
            )
        texts = {}
        for key, value in row.items():
            if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
                raise QuantizationError(
                    f"{where}: {key} must be a text of at most {_LONGEST_TEXT} characters; found "
                    f"{quoted(value)}"
                )
            texts[key] = value
        layers = texts.get("layers")
        if layers not in (None, OUTER):
            raise QuantizationError(
                f"{where}: layers must be {OUTER} or left out; found {quoted(layers)}"
            )
        try:
            activation = parse_activation(texts.get("activation", NONE))
            rule = Rule(
                texts["match"],
                texts["format"],
                texts.get("algorithm"),
                activation=activation,
                layers=layers,
            )
            rule.formats()
        except QuantizationError as error:
            raise QuantizationError(f"{where}: {error}") from error
        rules.append(rule)
    return Recipe(path.stem, f"rules from {path}", tuple(rules), rotation)


def _read_rules(path: Path) -> tuple[list[object], str | None]:
    try:
        data = parse_yaml(read_input(path, LARGEST_RECIPE))
    except OSError as error:
        raise QuantizationError(f"recipe {path} cannot be read: {error.strerror}") from error
    except YamlError as error:
        hint = ": put patterns with a star in quotes, as in {match: '*', format: int4-g32}"
        raise QuantizationError(f"recipe {path} {error}{hint if error.is_syntax else ''}") from None
    rotation = None
    if isinstance(data, dict) and {"rules"} <= data.keys() <= {"rules", "rotation"}:
        data, rotation = data["rules"], data.get("rotation")
    if rotation is not None and not isinstance(rotation, str):
        raise QuantizationError(f"recipe {path}: rotation must be a name, found {quoted(rotation)}")
    if not isinstance(data, list) or not data:
        raise QuantizationError(
            f"recipe {path} must be a list of rules, or a mapping with that list under the key "
            f"'rules'; the only other key allowed is 'rotation'"
        )
    return data, rotation
