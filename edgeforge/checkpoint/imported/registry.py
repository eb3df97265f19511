"""Methods of quantized checkpoints by ``quant_method``. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.awq import read_awq
from edgeforge.checkpoint.imported.compressed_tensors import read_compressed_tensors
from edgeforge.checkpoint.imported.gptq import read_gptq
from edgeforge.checkpoint.imported.packing import Packing
from edgeforge.errors import CheckpointError
from quant.quoted import quoted
from quant.suggestion import did_you_mean

FIELD = "quantization_config"

METHODS: dict[str, Callable[[ConfigReader], Packing]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
}


def read_packing(config: Mapping[str, object], ignore: Iterable[str] = ()) -> Packing | None:
    """Returns the packing that a ``config.json`` declares; None when the checkpoint holds floats.

    Args:
        config: the parsed ``config.json``.
        ignore: fields that the user knows not to change the maths.

    Raises:
        CheckpointError: the method is unknown, or a field is not implemented.
    """
    if not config.get(FIELD):
        return None
    reader = ConfigReader(config, ignore).section(FIELD)
    assert reader is not None
    method = reader.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise CheckpointError(
            f"config.json has a {FIELD}: the checkpoint is already quantized, by the quant_method "
            f"{quoted(method)}{hint}; EdgeForge imports {', '.join(METHODS)}: give a checkpoint of "
            f"one of these methods, or the original in bfloat16, float16 or float32"
        )
    return METHODS[method](reader)
