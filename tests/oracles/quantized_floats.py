"""Checkpoints as MLX, FP8's writers and bitsandbytes leave them, from floats one knows.

Quantizing and packing follow the formats' descriptions, on NumPy arrays, and share nothing with
what is under test. Each writer returns the tensors of one matrix and the values they stand for.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from edgeforge.synth.shapes import tensor_shapes
from edgeforge.synth.synthesise import write_byte_tokenizer

# The 16 levels of NormalFloat, as QLoRA's appendix lists them.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def mlx(weight: np.ndarray, bits: int, group_size: int, dtype: str = "bfloat16"):
    """MLX's affine quantization: the farthest value of a group lies on a code exactly."""
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    kind = np.float32 if dtype == "float32" else kind
    rows, columns = weight.shape
    groups = weight.astype(np.float32).reshape(rows, -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    top = (1 << bits) - 1
    negative = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, 1e-7)
    scale = np.where(negative, scale, -scale)
    edge = np.where(negative, low, high)
    code = np.round(edge / scale)
    scale = np.where(code == 0, scale, edge / np.where(code == 0, 1, code))
    bias = np.where(code == 0, 0, edge)
    scale, bias = scale.astype(kind), bias.astype(kind)
    inner, offset = scale.astype(np.float64)[..., None], bias.astype(np.float64)[..., None]
    codes = np.clip(np.round((groups - offset) / inner), 0, top).astype(np.uint64)
    values = (codes.astype(np.float64) * inner + offset).reshape(rows, columns)
    per = 32 // bits
    words = codes.reshape(rows, -1, per)
    shifts = np.arange(per, dtype=np.uint64) * np.uint64(bits)
    packed = (words << shifts).sum(-1).astype(np.uint32)
    return {"weight": packed, "scales": scale, "biases": bias}, values


def fp8(weight: np.ndarray, scales: str, block=None):
    """8-bit floats; ``block`` is a pair, ``"row"`` or None for one scale."""
    rows, columns = weight.shape
    most = float(torch.finfo(torch.float8_e4m3fn).max)
    if isinstance(block, tuple):
        high, wide = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
        scale = np.zeros((high, wide), np.float32)
        spread = np.zeros((rows, columns))
        for i in range(high):
            for j in range(wide):
                at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                scale[i, j] = np.abs(weight[at]).max() / most
                spread[at] = scale[i, j]
    elif block == "row":
        scale = (np.abs(weight).max(1, keepdims=True) / most).astype(np.float32)
        spread = np.broadcast_to(scale, weight.shape).astype(np.float64)
    else:
        scale = np.array(np.abs(weight).max() / most, np.float32)
        spread = np.full(weight.shape, float(scale))
    stored = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    values = stored.astype(np.float64) * spread
    return {"weight": stored, scales: scale}, values


def nf4(weight: np.ndarray, nested: bool, block: int = 64):
    """NF4 with the matrix's own blocks; ``nested`` quantizes their factors to 8 bits too."""
    flat = weight.astype(np.float64).flatten()
    blocks = -(-len(flat) // block)
    padded = np.zeros(blocks * block)
    padded[: len(flat)] = flat
    padded = padded.reshape(blocks, block)
    factors = np.abs(padded).max(1).astype(np.float32)
    state = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    parts = {}
    if nested:
        offset = float(factors.mean())
        table = np.sort(np.concatenate([np.linspace(-1, 1, 255), [0.0]])).astype(np.float32)
        outer = -(-blocks // 256)
        rest = np.zeros(outer * 256)
        rest[:blocks] = factors - offset
        most = np.abs(rest.reshape(outer, 256)).max(1).astype(np.float32)
        share = rest.reshape(outer, 256) / most[:, None]
        codes = np.abs(share[..., None] - table).argmin(-1).flatten()[:blocks].astype(np.uint8)
        factors = table[codes].astype(np.float64) * most.repeat(256)[:blocks] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts = {
            "weight.absmax": codes,
            "weight.nested_absmax": most,
            "weight.nested_quant_map": table,
        }
    else:
        parts = {"weight.absmax": factors}
    codes = np.abs((padded / np.asarray(factors)[:, None])[..., None] - NF4).argmin(-1)
    values = (NF4[codes].astype(np.float64) * np.asarray(factors)[:, None]).flatten()
    codes = codes.flatten()[: len(flat) + len(flat) % 2].astype(np.uint8)
    packed = (codes[0::2] << 4) | codes[1::2]
    text = json.dumps(state).encode()
    parts |= {
        "weight": packed.reshape(-1, 1),
        "weight.quant_map": NF4,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(text, np.uint8).copy(),
    }
    return parts, values[: len(flat)].reshape(weight.shape)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bits."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())


def write(folder: Path, config: dict, quantize, section: dict, seed: int = 0) -> dict:
    """Writes a checkpoint of random weights; returns the values of quantized matrices by name.

    ``quantize(name, weight)`` returns a matrix's tensors by part and its values, or None for one
    that stays float.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, **section}), encoding="utf-8")
    draw = np.random.default_rng(seed)
    tensors, values = {}, {}
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            tensors[name] = as_torch(draw.normal(1, 0.1, shape).astype(ml_dtypes.bfloat16))
            continue
        weight = draw.normal(0, 1, shape) / np.sqrt(shape[1])
        made = quantize(name, weight)
        if made is None:
            tensors[name] = as_torch(weight.astype(ml_dtypes.bfloat16))
            continue
        module = name.removesuffix(".weight")
        parts, values[name] = made
        tensors |= {f"{module}.{part}": as_torch(value) for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_byte_tokenizer(folder, config["vocab_size"])
    return values
