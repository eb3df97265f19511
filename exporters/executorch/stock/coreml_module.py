"""A program as the torch module that ExecuTorch's Core ML delegate can hold whole.

Core ML takes no custom operator and no dynamic shape beside states, so one token is run at a time
and attention is spelled out: a static shape, caches written by index, everything seen through a
mask. Weights stay integers (`constexpr_blockwise_shift_scale`), activations are float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from exporters.executorch.stock.module import HANDLERS, Handler, StockModule
from quant.program import dialect
from quant.program.calls import AttentionCall, QuantizedCall

_HIDDEN: Final = -3e4  # within float16, and far below any score
_LARGEST_SMALL: Final = 1e-4  # below it a token's largest value is taken for this


class CoremlModule(StockModule):
    """``tokens int64[1, 1], position int64[1] -> float32[1, 1, vocab]``."""

    @property
    def handlers(self) -> Mapping[object, Handler]:
        """What each operator means."""
        return _HANDLERS

    def begin(self, tokens: Tensor, position: Tensor) -> None:
        """Takes rows of the rotary tables by a lookup: a slice would be of dynamic place."""
        self.tokens, self.position = tokens, position
        self.rows = {
            name: torch.index_select(self.kept(name, "table"), 0, position).view(1, 1, 1, -1)
            for name in self.program.tables
        }
        numbers = self.kept("numbers", "table")
        self.distance = position.to(torch.float32) - numbers  # of each token from the new one


def _widened(state: StockModule, node: fx.Node) -> Any:
    """A weight as floating-point numbers, of integers that the delegate keeps."""
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
    """Scaled by each token's largest value first: in float16 squares would overflow."""
    x = given[0]
    largest = torch.clamp(x.abs().amax(-1, keepdim=True), min=_LARGEST_SMALL)
    x = x / largest
    mean = (x * x).mean(-1, keepdim=True)
    normed: Tensor = x * torch.rsqrt(mean + given[2] / (largest * largest))
    return normed * state.part(node, 1, "value")


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
    # Query groups side by side instead of copies of keys: [1, kv_heads, group, width].
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
    dialect.ATTENTION: _attention,
}
