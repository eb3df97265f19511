"""The names that configurations give activation functions."""

from __future__ import annotations

from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.spec import Activation

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""The activation function by its name in transformers; several names stand for the same one."""


def read_activation(config: ConfigReader, field: str, default: str) -> Activation:
    """Returns the activation function that a field names.

    Args:
        config: the reader of ``config.json``.
        field: the field's name.
        default: its value where the file has none.

    Raises:
        CheckpointError: the field names a function that is not implemented.
    """
    return ACTIVATIONS[config.choice(field, tuple(ACTIVATIONS), default)]
