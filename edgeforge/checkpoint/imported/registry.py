"""Methods of quantized checkpoints by ``quant_method``. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.awq import read_awq
from edgeforge.checkpoint.imported.compressed_tensors import read_compressed_tensors
from edgeforge.checkpoint.imported.gguf_tensors import GgufTensors
from edgeforge.checkpoint.imported.gptq import read_gptq
from edgeforge.checkpoint.imported.method import Method
from edgeforge.checkpoint.imported.packed_tensor import PackedLayers
from edgeforge.errors import CheckpointError
from quant.quoted import quoted
from quant.suggestion import did_you_mean

if TYPE_CHECKING:
    from edgeforge.checkpoint.checkpoint import Checkpoint

FIELD = "quantization_config"

METHODS: dict[str, Callable[[ConfigReader], Method]] = {
    "gptq": lambda reader: PackedLayers(read_gptq(reader)),
    "awq": lambda reader: PackedLayers(read_awq(reader)),
    "compressed-tensors": lambda reader: PackedLayers(read_compressed_tensors(reader)),
}

MLX_FIELD = "quantization"

_ORIGINAL = "give the original checkpoint, in bfloat16, float16 or float32"
OTHER_METHODS: dict[str, str] = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "mxfp8"), "8-bit floats, FP8"),
    **dict.fromkeys(("nvfp4", "mxfp4", "fp_quant"), "4-bit floats"),
    "modelopt": "floats or integers as NVIDIA's ModelOpt writes them",
    "bitsandbytes": "4-bit NormalFloat or 8-bit integers with outliers apart",
    "torchao": "tensor classes of PyTorch's own",
    **dict.fromkeys(("exl2", "exl3"), "the layouts of ExLlama"),
    "aqlm": "additive codebooks",
    "vptq": "vector codebooks",
    "bitnet": "three values for each weight",
    "gguf": "the layouts of llama.cpp",
}
"""What known methods store that EdgeForge does not import, by ``quant_method``."""


def method_of(checkpoint: Checkpoint, ignore: Iterable[str] = ()) -> Method | None:
    """Returns how an opened checkpoint holds its matrices; None where they are plain floats.

    Raises:
        CheckpointError: as `read_method`.
    """
    if checkpoint.gguf is not None:
        return GgufTensors(checkpoint.gguf)
    return read_method(checkpoint.config, ignore)


def read_method(config: Mapping[str, object], ignore: Iterable[str] = ()) -> Method | None:
    """Returns the method that a ``config.json`` declares; None when the checkpoint holds floats.

    Args:
        config: the parsed ``config.json``.
        ignore: fields that the user knows not to change the maths.

    Raises:
        CheckpointError: the method is unknown, or a field is not implemented.
    """
    _refuse_mlx(config, ignore)
    if not config.get(FIELD):
        return None
    reader = ConfigReader(config, ignore).section(FIELD)
    assert reader is not None
    method = reader.get("quant_method")
    # Files of bitsandbytes were written without a method's name at first.
    if method is None and {"load_in_4bit", "load_in_8bit"} & reader.fields():
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        known = OTHER_METHODS.get(str(method).lower())
        what = "" if known is None else f" ({known})"
        raise CheckpointError(
            f"config.json has a {FIELD}: the checkpoint is already quantized, by the quant_method "
            f"{quoted(method)}{what}{hint}; EdgeForge imports {', '.join(METHODS)}: give a "
            f"checkpoint of one of these methods, or the original in bfloat16, float16 or float32"
        )
    return METHODS[method](reader)


def _refuse_mlx(config: Mapping[str, object], ignore: Iterable[str]) -> None:
    """Refuses a checkpoint that MLX has quantized, which has a section of its own."""
    given = config.get(MLX_FIELD)
    if not isinstance(given, dict) or "bits" not in given or MLX_FIELD in ignore:
        return
    raise CheckpointError(
        f"config.json has the section {MLX_FIELD!r} with {quoted(given['bits'])} bits: the "
        f"checkpoint is quantized by MLX, whose layout EdgeForge does not import: {_ORIGINAL}"
    )
