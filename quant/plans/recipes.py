"""The recipes that have a name on the command line, and those that are read from YAML."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quant.errors import QuantizationError
from quant.formats.activations import NONE, TENSOR, TOKEN, Activation, parse_activation
from quant.input_files import read_input
from quant.plans.algorithms import SIGNED
from quant.plans.int4 import INT4, INT4_VOCAB8
from quant.plans.rules import Recipe, Rule
from quant.quoted import quoted
from quant.suggestion import did_you_mean
from quant.yaml_input import YamlError, parse_yaml

LARGEST_RECIPE = 1 << 20
"""The most bytes of a file of rules; one rule for each weight of a large model takes a tenth."""
_LONGEST_TEXT = 500


def _uniform(name: str, format: str, about: str, algorithm: str | None = None) -> Recipe:
    return Recipe(name, about, (Rule("*", format, algorithm),))


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
        INT4,
        _uniform("int4-g32", "int4-g32", "4 bits, groups of 32: 4.5 bits a weight"),
        _uniform("int4-g64", "int4-g64", "4 bits, groups of 64: 4.25 bits a weight"),
        _uniform("int4-g128", "int4-g128", "4 bits, groups of 128: 4.125 bits, the fastest"),
        INT4.by("int4-gptq", "gptq-descent", "the formats of int4, by GPTQ on a calibration text"),
        INT4.by("int4-awq", "awq", "the formats of int4, by AWQ on a calibration text"),
        INT4_VOCAB8,
        INT4_VOCAB8.by("int4-vocab8-gptq", "gptq-descent", "the formats of int4-vocab8, by GPTQ"),
        _uniform("int4-g128-gptq", "int4-g128", "4 bits, groups of 128, by GPTQ", "gptq-descent"),
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


VOCABULARY_RECIPES = {"int4": "int4-vocab8", "int4-gptq": "int4-vocab8-gptq"}
"""By recipe: the one that differs only in having 8 bits for embedding and head."""


def find_recipe(name: str, others: Iterable[str] = ()) -> Recipe:
    """Returns a recipe by its name, or reads it from a YAML file of rules.

    The file holds a list of ``{match: PATTERN, format: NAME, algorithm: NAME, activation: NAME}``,
    where ``algorithm`` and ``activation`` may be left out. Or it holds a mapping with that list
    under ``rules`` and, optionally, a rotation's name under ``rotation``.

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
    fields = {"match", "format", "algorithm", "activation"}
    rules = []
    for number, row in enumerate(rows, start=1):
        where = f"recipe {path}: rule {number}"
        if not isinstance(row, dict) or not {"match", "format"} <= set(row) <= fields:
            raise QuantizationError(
                f"{where} must have match and format, and may have algorithm and activation; "
                f"found {quoted(row)}"
            )
        texts = {}
        for key, value in row.items():
            if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
                raise QuantizationError(
                    f"{where}: {key} must be a text of at most {_LONGEST_TEXT} characters; found "
                    f"{quoted(value)}"
                )
            texts[key] = value
        try:
            activation = parse_activation(texts.get("activation", NONE))
            rule = Rule(
                texts["match"], texts["format"], texts.get("algorithm"), activation=activation
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
