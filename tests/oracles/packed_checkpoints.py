"""Writes checkpoints as GPTQ, AWQ and compressed-tensors publish them, from integers one knows.

Packing and unpacking are written nibble by nibble from the formats' descriptions, on Python
integers, and share nothing with what is under test.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edgeforge.synth.shapes import tensor_shapes
from edgeforge.synth.synthesise import write_byte_tokenizer

VOCAB = 320
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layer:
    """What a layer's tensors stand for.

    ``codes: [out, in]``, ``zeros: [out, groups]``, ``scales: float16[out, groups]``.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        rows, columns = self.codes.shape
        out = np.empty((rows, columns), np.float64)
        width = columns // self.scales.shape[1]
        for column in range(columns):
            group = column // width
            step = self.codes[:, column].astype(np.int64) - self.zeros[:, group]
            out[:, column] = step * self.scales[:, group].astype(np.float64)
        return out


def word(values: list[int], bits: int) -> int:
    """Values in one 32-bit word, the first in the lowest bits, as a signed integer."""
    total = 0
    for index, value in enumerate(values):
        assert 0 <= value < 1 << bits
        total |= value << (index * bits)
    return total - (1 << 32) if total >= 1 << 31 else total


def pack_rows(matrix: np.ndarray, bits: int) -> np.ndarray:
    """Words down the first axis: ``[n, m] -> int32[n * bits / 32, m]``."""
    per = 32 // bits
    return np.array(
        [
            [word([int(v) for v in matrix[i : i + per, j]], bits) for j in range(matrix.shape[1])]
            for i in range(0, len(matrix), per)
        ],
        np.int32,
    )


def pack_columns(matrix: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Words along the second axis, in an order: ``[n, m] -> int32[n, m * bits / 32]``."""
    per = 32 // bits
    order = order or tuple(range(per))
    return np.array(
        [
            [word([int(row[j + k]) for k in order], bits) for j in range(0, len(row), per)]
            for row in matrix
        ],
        np.int32,
    )


def gptq(layer: Layer, bits: int, minus_one: bool = True) -> dict[str, np.ndarray]:
    rows, columns = layer.codes.shape
    groups = layer.scales.shape[1]
    return {
        "qweight": pack_rows(layer.codes.T, bits),
        "qzeros": pack_columns(layer.zeros.T - (1 if minus_one else 0), bits),
        "scales": np.ascontiguousarray(layer.scales.T),
        "g_idx": np.arange(columns, dtype=np.int32) // (columns // groups),
        "bias": np.zeros(rows, np.float16),  # as older writers leave it
    }


def awq(layer: Layer) -> dict[str, np.ndarray]:
    return {
        "qweight": pack_columns(layer.codes.T, 4, AWQ_ORDER),
        "qzeros": pack_columns(layer.zeros.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(layer.scales.T),
    }


def compressed(layer: Layer, bits: int, symmetric: bool) -> dict[str, np.ndarray]:
    tensors = {
        "weight_packed": pack_columns(layer.codes, bits),
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(layer.zeros, bits)
    return tensors


def compressed_config(bits: int, group_size: int | None, symmetric: bool) -> dict[str, object]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                    "dynamic": False,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "actorder": None,
                    "block_structure": None,
                },
            }
        },
    }


def gptq_config(bits: int, group_size: int, sym: bool, **changes: object) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": False,
        "damp_percent": 0.01,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:1.0"]},
        **changes,
    }


def awq_config(group_size: int, **changes: object) -> dict[str, object]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        **changes,
    }


@dataclass(frozen=True)
class Case:
    """One way to quantize: ``group_size`` of 0 is one group a row."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    version: str = "gptq"
    exact_scales: bool = False

    def config(self) -> dict[str, object]:
        size = self.group_size or -1
        match self.method:
            case "gptq":
                form = "gptq" if self.version == "mislabelled" else self.version
                return gptq_config(self.bits, size, self.symmetric, checkpoint_format=form)
            case "awq":
                return awq_config(size)
            case _:
                return compressed_config(self.bits, self.group_size or None, self.symmetric)

    def tensors(self, layer: Layer) -> dict[str, np.ndarray]:
        match self.method:
            case "gptq":
                return gptq(layer, self.bits, minus_one=self.version == "gptq")
            case "awq":
                return awq(layer)
            case _:
                return compressed(layer, self.bits, self.symmetric)

    def draw(self, rows: int, columns: int, draw: np.random.Generator) -> Layer:
        groups = columns // (self.group_size or columns)
        codes = draw.integers(0, 1 << self.bits, (rows, columns), dtype=np.uint8)
        middle, top = 1 << (self.bits - 1), 1 << self.bits
        if self.symmetric:
            zeros = np.full((rows, groups), middle, np.uint8)
        else:  # the older format cannot say 0
            zeros = draw.integers(1, top, (rows, groups), dtype=np.uint8)
        scales = draw.uniform(0.4, 1.6, (rows, groups)) / middle / np.sqrt(columns)
        if self.exact_scales:
            scales = 2.0 ** np.round(np.log2(scales))
        return Layer(codes, zeros, scales.astype(np.float16))


CASES = {
    "gptq-symmetric": Case("gptq", 4, 32, True),
    "gptq-asymmetric": Case("gptq", 4, 32, False),
    "gptq-v2": Case("gptq", 4, 16, False, "gptq_v2"),
    "gptq-mislabelled": Case("gptq", 4, 32, True, "mislabelled"),
    "gptq-rows": Case("gptq", 4, 0, True),
    "gptq-8-bits": Case("gptq", 8, 32, True),
    "awq": Case("awq", 4, 32, False),
    "awq-exact-scales": Case("awq", 4, 16, True, exact_scales=True),
    "compressed-4": Case("compressed-tensors", 4, 32, True),
    "compressed-4-asymmetric": Case("compressed-tensors", 4, 32, False),
    "compressed-8": Case("compressed-tensors", 8, 0, True),
}


def write(folder: Path, config: dict[str, object], case: Case, seed: int = 0) -> dict[str, Layer]:
    """A checkpoint folder of random integers; returns what each layer's stand for, by module."""
    folder.mkdir(parents=True)
    text = json.dumps({**config, "quantization_config": case.config()})
    (folder / "config.json").write_text(text, encoding="utf-8")
    draw = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, Layer] = {}
    for name, shape in tensor_shapes(config):
        module = name.removesuffix(".weight")
        if name.endswith(".bias"):
            continue  # below: a method may store a bias of its own beside a layer
        if "_proj" in module or ".experts." in module:
            layers[module] = case.draw(*shape, draw)
            packed = case.tensors(layers[module])
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        elif len(shape) == 1:
            tensors[name] = draw.normal(1, 0.1, shape).astype(np.float16)
        else:
            tensors[name] = (draw.normal(0, 1, shape) / np.sqrt(shape[1])).astype(np.float16)
    for name, shape in tensor_shapes(config):
        if name.endswith(".bias"):
            tensors[name] = draw.normal(0, 0.1, shape).astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    write_byte_tokenizer(folder, VOCAB)
    return layers


def family(kind: str, **changes: object) -> dict[str, object]:
    """A config of two layers of a family."""
    config: dict[str, object] = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **changes,
    }
    if kind == "phi3":
        config |= {"original_max_position_embeddings": 256, "sliding_window": None}
    if kind == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "mistral":
        config |= {"sliding_window": 24}
    return config
