"""A program by ExecuTorch's own exporter: a torch module, torch.export, its XNNPACK partitioner.

The module says in torch's operators what each ``edgeforge::`` operator means, with weights
unpacked by NumPy; everything after that is ExecuTorch's.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant import dialect
from quant.formats import IntFormat, parse_format
from quant.program import Program
from quant.store import WeightStore


def stock_pte(program: Program, store: WeightStore, tokens: int) -> bytes:
    """A .pte with one method, ``forward``, that gives every position's logits.

    Args:
        program: in the quantized dialect, without a window.
        store: its weights.
        tokens: how many one run takes at most.
    """
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    # Only that makes torch.export know the operators that spell quantization out.
    from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401

    example = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            _Stock(program, store).eval(),
            example,
            dynamic_shapes=({1: torch.export.Dim("t", min=1, max=tokens)}, None),
            strict=False,
        )
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        return bytes(edge.to_executorch().buffer)


def _numbers(store: WeightStore, weight: str, format: IntFormat) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes ``int8[rows, columns]`` and scales ``float32[rows, groups]``."""
    codes = store.part(weight, "codes").numpy()
    if format.bits == 4:
        codes = np.stack((codes % 16, codes // 16), -1).reshape(len(codes), -1)
    signed = (codes.astype(np.int16) - (8 if format.bits == 4 else 128)).astype(np.int8)
    return signed, store.part(weight, "scale").float().numpy()


class _Stock(nn.Module):
    def __init__(self, program: Program, store: WeightStore) -> None:
        super().__init__()
        self.program = program
        for name, assignment in store.plan.weights.items():
            format = assignment.format
            if not isinstance(format, IntFormat):
                value = store.part(name, "value").float()
                self._keep(name, "value", value[0] if len(value) == 1 else value)
                if len(value) == 1:
                    self._keep(name, "mean", torch.full(value.shape, 1 / value.numel()))
                continue
            codes, scale = _numbers(store, name, format)
            grouped = format.group_size is not None
            self._keep(name, "codes", torch.from_numpy(codes))
            self._keep(name, "rows", torch.from_numpy(_embedding_rows(codes, format.bits)))
            self._keep(name, "row scale", torch.from_numpy(scale))
            column = torch.from_numpy(scale if grouped else scale[:, 0].copy())
            self._keep(name, "scale", column)
            zero = torch.zeros(column.shape, dtype=torch.int32 if grouped else torch.int64)
            self._keep(name, "zero", zero)
        for name, table in program.tables.items():
            self.register_buffer(name, table)
        for node, given in program.placeholders("cache"):
            _, heads, context, width = node.meta["val"].shape
            self._keep(given.name, "cache", torch.zeros(1, context, heads, width))

    def _keep(self, name: str, part: str, value: Tensor) -> None:
        self.register_buffer(f"{name} {part}".replace(".", "_").replace(" ", "__"), value)

    def _part(self, node, part: str) -> Tensor:
        name = self.program.inputs[node.name].name
        return self.get_buffer(f"{name} {part}".replace(".", "_").replace(" ", "__"))

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        start, count = position[0].item(), tokens.shape[1]
        torch._check(start >= 0)
        torch._check(start < self.program.context)
        torch._check(start + count <= self.program.context)
        rows = [
            self.get_buffer(name).narrow(0, start, count).view(1, -1, 1, width)
            for name in ("rope_cos", "rope_sin")
            for width in [self.get_buffer(name).shape[1]]
        ]
        values: dict = {}
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node.target is dialect.SIZE:
                continue
            given = [values.get(a) if isinstance(a, torch.fx.Node) else a for a in node.args]
            values[node] = self._call(node, given, tokens, start, rows)
        return values[self.program.output()]

    def _call(self, node, given, tokens, start, rows):
        args, decomposed = node.args, torch.ops.quantized_decomposed
        match node.target:
            case dialect.EMBEDDING:
                return F.embedding(tokens, self._part(args[1], "value"))
            case dialect.QUANT_EMBEDDING:
                bits = parse_format(args[4]).bits
                look_up = decomposed.embedding_4bit if bits == 4 else decomposed.embedding_byte
                half = 2 ** (bits - 1)
                table = self._part(args[1], "rows"), self._part(args[1], "row scale")
                return look_up.dtype(*table, None, -half, half - 1, tokens, dtype=torch.float32)
            case dialect.LINEAR:
                return F.linear(given[0], self._part(args[1], "value"))
            case dialect.QUANT_LINEAR:
                return self._quantized(given[0], args[1], parse_format(args[4]))
            case dialect.RMS_NORM:
                x = given[0]
                # A mean would stay outside the delegate, where its sum has another order.
                mean = F.linear(x * x, self._part(args[1], "mean"))
                return x * torch.rsqrt(mean + args[2]) * self._part(args[1], "value")
            case dialect.ROPE:
                cos, sin = rows
                half, x = cos.shape[-1], given[0]
                first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
                turned = [first * cos - second * sin, second * cos + first * sin]
                return torch.cat(turned + ([rest] if rest.shape[-1] else []), -1)
            case dialect.ATTENTION:
                q, k, v = given[:3]
                caches = self._part(args[3], "cache"), self._part(args[4], "cache")
                for new, cache in zip((k, v), caches, strict=True):
                    torch.ops.llama.update_cache(new, cache, start)
                out = torch.ops.llama.custom_sdpa(q, *caches, start, None, 0.0, True, args[7])
                return out.reshape(1, -1, q.shape[2] * q.shape[3])
            case dialect.VIEW:
                return given[0].view([d if isinstance(d, int) else -1 for d in args[1]])
            case dialect.GET:
                return given[0][args[1]]
            case _:
                return node.target(*given)

    def _quantized(self, x, weight, format):
        decomposed = torch.ops.quantized_decomposed
        scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
        bounds = -128, 127, torch.int8
        x = decomposed.quantize_per_token(x, scale, zero, *bounds)
        x = decomposed.dequantize_per_token(x, scale, zero, *bounds, torch.float32)
        half = 2 ** (format.bits - 1)
        parts = [self._part(weight, part) for part in ("codes", "scale", "zero")]
        if format.group_size is None:
            wide = decomposed.dequantize_per_channel(*parts, 0, -half, half - 1, torch.int8)
        else:
            size = format.group_size
            wide = decomposed.dequantize_per_channel_group(
                *parts, -half, half - 1, torch.int8, size, torch.float32
            )
        return F.linear(x, wide)


def _embedding_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as the embedding kernels read them: 4 bits with the even column in the high nibble."""
    if bits == 8:
        return codes
    unsigned = (codes + 8).astype(np.uint8)
    return unsigned[:, 0::2] * 16 + unsigned[:, 1::2]
