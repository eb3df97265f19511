"""What is known of a recipe's accuracy: figures of the project's own page of benchmarks.

They are of the weights alone on one small model. A larger model loses less by the same recipe, so
they order recipes and do not promise a figure; `verify` measures an artifact's own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from quant.json_input import parse_json

FILE: Final = Path(__file__).with_name("accuracy.json")


@cache
def _measured() -> dict[str, Any]:
    return cast("dict[str, Any]", parse_json(FILE.read_bytes()))


def measured_model() -> str:
    """Returns the name of the model that the figures are of."""
    return str(_measured()["model"])


def measured_kl(recipe: str, target: str) -> float | None:
    """Returns a recipe's mean KL divergence from the float weights, in nats a token.

    Args:
        recipe: the recipe's name.
        target: the target; a recipe whose plan depends on it has a figure for each.

    >>> measured_kl("int8", "onnx"), measured_kl("lut4", "coreml")
    (0.004, None)
    """
    figures = _measured()["kl_mean"].get(recipe, {})
    return cast("float | None", figures.get(target, figures.get("")))
