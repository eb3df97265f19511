"""Methods of quantized checkpoints by ``quant_method``. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.awq import read_awq
from edgeforge.checkpoint.imported.compressed_tensors import read_compressed_tensors
from edgeforge.checkpoint.imported.gptq import read_gptq
from edgeforge.checkpoint.imported.packing import Packing
from edgeforge.errors import CheckpointError
from quant.suggestion import did_you_mean

FIELD = "quantization_config"

METHODS: dict[str, Callable[[ConfigReader], Packing]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
}


def read_packing(config: Mapping[str, object], ignore: Iterable[str] = ()) -> Packing | None:
    """The packing that a ``config.json`` declares; None when the checkpoint holds floats.

    Args:
        config: the parsed ``config.json``.
        ignore: fields the user vouches for.

    Raises:
        CheckpointError: another method, or a field that is not implemented.
    """
    if not config.get(FIELD):
        return None
    reader = ConfigReader(config, ignore).section(FIELD)
    assert reader is not None
    method = reader.get("quant_method")
    if method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise CheckpointError(
            f"config.json has a {FIELD}: the checkpoint is already quantized, by the quant_method "
            f"{method!r}{hint}; EdgeForge imports {', '.join(METHODS)}: give one of these, or the "
            f"original in bfloat16, float16 or float32"
        )
    return METHODS[str(method)](reader)
