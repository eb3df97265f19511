"""Methods of quantized checkpoints by ``quant_method``. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.awq import read_awq
from edgeforge.checkpoint.imported.bitsandbytes import read_bitsandbytes
from edgeforge.checkpoint.imported.compressed_tensors import read_compressed_tensors
from edgeforge.checkpoint.imported.fp8 import read_fbgemm, read_fp8
from edgeforge.checkpoint.imported.gguf_tensors import GgufTensors
from edgeforge.checkpoint.imported.gptq import read_gptq
from edgeforge.checkpoint.imported.method import Method
from edgeforge.checkpoint.imported.mlx import read_mlx
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
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "bitsandbytes": read_bitsandbytes,
}

MLX_FIELD = "quantization"

OTHER_METHODS: dict[str, str] = {
    "mxfp8": "8-bit floats with scales of powers of two",
    **dict.fromkeys(("nvfp4", "mxfp4", "fp_quant"), "4-bit floats"),
    "modelopt": "floats or integers as NVIDIA's ModelOpt writes them",
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
    mlx = config.get(MLX_FIELD)
    if isinstance(mlx, dict) and "bits" in mlx and MLX_FIELD not in ignore:
        return read_mlx(mlx, ignore, f"config.json: {MLX_FIELD}")
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
