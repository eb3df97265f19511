"""A program as a torch module that ExecuTorch's Core ML delegate can hold as a whole.

Core ML takes no custom operator, and no dynamic shape together with states. So one run takes one
token, and attention consists of plain operators with static shapes: caches are written by index,
and a mask hides the tokens that are not visible. Weights stay integers
(`constexpr_blockwise_shift_scale`), activations are float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from exporters.executorch.stock.module import HANDLERS, Handler, StockModule
from quant.program import dialect
from quant.program.calls import AttentionCall, LayerNormCall, QuantizedCall

_HIDDEN: Final = -3e4  # a float16 number that is far below any score
_LARGEST_SMALL: Final = 1e-4  # a norm's divisor is at least this


class CoremlModule(StockModule):
    """One method: ``tokens int64[1, 1], position int64[1] -> float32[1, 1, vocab]``."""

    @property
    def handlers(self) -> Mapping[object, Handler]:
        """The handler of each operator."""
        return _HANDLERS

    def begin(self, tokens: Tensor, position: Tensor) -> None:
        """Takes rows of the rotary tables by a lookup; a slice's bounds would be dynamic."""
        self.tokens, self.position = tokens, position
        self.rows = {
            name: torch.index_select(self.kept(name, "table"), 0, position).view(1, 1, 1, -1)
            for name in self.program.tables
        }
        numbers = self.kept("numbers", "table")
        # How far each token of the caches is before the new one.
        self.distance = position.to(torch.float32) - numbers


def _widened(state: StockModule, node: fx.Node) -> Any:
    """Dequantizes a weight; the delegate keeps the integers and dequantizes them itself."""
    format = QuantizedCall.of(node).integers
    codes, scale, zero = (state.part(node, 1, part) for part in ("codes", "scale", "zero"))
    half, columns = format.implicit_zero_point, codes.shape[1]
    return torch.ops.torchao.dequantize_affine(
        codes,
        [1, format.columns_per_group(columns)],
        scale,
        zero,
        torch.int8,
        -half,
        half - 1,
    )


def _quant_linear(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    return F.linear(given[0], _widened(state, node))


def _quant_embedding(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    return F.embedding(state.tokens, _widened(state, node))


def _rms_norm(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    """RMSNorm that first divides by each token's largest magnitude, as float16 squares overflow."""
    x = given[0]
    largest = torch.clamp(x.abs().amax(-1, keepdim=True), min=_LARGEST_SMALL)
    x = x / largest
    mean = (x * x).mean(-1, keepdim=True)
    normed: Tensor = x * torch.rsqrt(mean + given[2] / (largest * largest))
    return normed * state.part(node, 1, "value")


def _layer_norm(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    """LayerNorm as one operator, which Core ML computes without squares that overflow."""
    call = LayerNormCall.of(node)
    weight = None if call.weight is None else state.part(node, 1, "value")
    shift = None if call.bias is None else state.part(node, 2, "value")
    return F.layer_norm(given[0], given[0].shape[-1:], weight, shift, call.epsilon)


def _attention(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    assert isinstance(state, CoremlModule)
    q, k, v = given[:3]
    call = AttentionCall.of(node)
    caches = []
    for new, index in ((k, 3), (v, 4)):
        cache = state.part(node, index, "cache")
        caches.append(torch.ops.aten.index_put_(cache, [None, state.position], new))
    keys, values = (cache.transpose(1, 2) for cache in caches)  # [1, kv_heads, context, width]
    heads, kv_heads, width = q.shape[2], keys.shape[1], q.shape[3]
    # Query heads that share a key head form one matrix [group, width], so that no key is copied.
    grouped = q.view(1, kv_heads, heads // kv_heads, width) * call.scale
    seen = state.distance >= 0
    if call.window:
        seen = torch.logical_and(seen, state.distance < call.window)
    scores = torch.matmul(grouped, keys.transpose(2, 3)) + torch.where(seen, 0.0, _HIDDEN)
    mixed: Tensor = torch.matmul(torch.softmax(scores, -1), values).reshape(1, 1, -1)
    return mixed


_HANDLERS: Mapping[object, Handler] = {
    **HANDLERS,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.RMS_NORM: _rms_norm,
    dialect.LAYER_NORM: _layer_norm,
    dialect.ATTENTION: _attention,
}
