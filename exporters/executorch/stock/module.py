"""A program as a torch module that ExecuTorch's exporter understands.

The module computes each ``edgeforge::`` operator with torch's operators, in the patterns that
ExecuTorch's partitioners look for. It unpacks the weights from the store, so that this route holds
several copies of the whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from exporters.errors import ExportError
from quant.formats.formats import IntFormat
from quant.program import dialect
from quant.program.calls import AttentionCall, LayerNormCall, QuantizedCall
from quant.program.program import Program, node_argument, shape_of
from quant.store.store import WeightStore

_HIDDEN: Final = -1e30  # added to the score of a token outside the window, so that exp gives 0


class StockWeights:
    """Every weight of a store in the dtypes and shapes that the module computes with.

    Attributes:
        buffers: the tensors, by weight and part. ``value`` is float32. ``codes`` are
            ``int8[out, in]``, signed. ``rows`` are the same codes for embedding kernels; those of
            4 bits are two in a byte, with the even column in the high nibble. ``scale`` and
            ``row scale`` are ``float32[out, groups]``; ``scale`` is ``float32[out]`` when there is
            one group. ``zero`` has the shape of ``scale`` and is 0.
    """

    def __init__(self, program: Program, store: WeightStore) -> None:
        self.buffers: dict[tuple[str, str], Tensor] = {}
        uses = {(n.target, _weight_of(program, n)) for n in program.graph.nodes if _has_weight(n)}
        for name, assignment in store.plan.weights.items():
            format = assignment.format
            if isinstance(format, IntFormat):
                self._unpack(name, format, store, uses)
                continue
            value = store.part(name, "value").float()
            self.buffers[name, "value"] = value[0] if len(value) == 1 else value

    def _unpack(
        self, name: str, format: IntFormat, store: WeightStore, uses: set[tuple[object, str]]
    ) -> None:
        codes, scale = store.part(name, "codes"), store.part(name, "scale").float()
        half = format.implicit_zero_point
        if format.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        signed = (codes.to(torch.int16) - half).to(torch.int8)
        if (dialect.QUANT_EMBEDDING, name) in uses:
            rows = signed
            if format.bits == 4:
                rows = codes[:, 0::2] << 4 | codes[:, 1::2]
            # The scale is copied because the exporter makes one constant of one tensor, and may
            # transpose the product's.
            self.buffers[name, "rows"], self.buffers[name, "row scale"] = rows, scale.clone()
        if (dialect.QUANT_LINEAR, name) in uses:
            grouped = format.group_size is not None
            column = scale if grouped else scale[:, 0].contiguous()
            zero = torch.zeros(column.shape, dtype=torch.int32 if grouped else torch.int64)
            self.buffers[name, "codes"], self.buffers[name, "scale"] = signed, column
            self.buffers[name, "zero"] = zero


def _has_weight(node: fx.Node) -> bool:
    return node.target in (dialect.RMS_NORM, dialect.QUANT_EMBEDDING, dialect.QUANT_LINEAR)


def _weight_of(program: Program, node: fx.Node) -> str:
    return program.inputs[node_argument(node, 1).name].name


class StockModule(nn.Module):
    """One method: ``tokens int64[1, t], position int64[1] -> float32[1, t or 1, vocab]``.

    Args:
        program: the program, in the quantized or the lowered dialect.
        weights: the weights of its store, which all methods share.
        tokens: how many tokens one run takes at most.
    """

    def __init__(self, program: Program, weights: StockWeights, tokens: int) -> None:
        super().__init__()
        self.program, self.limit = program, tokens
        for (name, part), value in weights.buffers.items():
            self._keep(name, part, value)
        for name, table in program.tables.items():
            self._keep(name, "table", table)
        self._keep("numbers", "table", torch.arange(program.context, dtype=torch.float32))
        norms = (dialect.RMS_NORM, dialect.LAYER_NORM)
        for width in {shape_of(n)[-1] for n in program.graph.nodes if n.target in norms}:
            self._keep(str(width), "mean", torch.full((1, width), 1 / width))
        for node, given in program.placeholders("cache"):
            _, heads, context, width = node.meta["val"].shape
            self._keep(given.name, "cache", torch.zeros(1, context, heads, width))

    def _keep(self, name: str, part: str, value: Tensor) -> None:
        self.register_buffer(_buffer_name(name, part), value)

    def kept(self, name: str, part: str) -> Tensor:
        """The buffer of this part of a weight, table or cache, by its name."""
        return self.get_buffer(_buffer_name(name, part))

    def part(self, node: fx.Node, index: int, part: str) -> Tensor:
        """The part of the weight or cache that an argument names."""
        return self.kept(self.program.inputs[node_argument(node, index).name].name, part)

    @property
    def handlers(self) -> Mapping[object, Handler]:
        """The handler of each operator."""
        return HANDLERS

    def begin(self, tokens: Tensor, position: Tensor) -> None:
        """Computes the values that a run's operators share."""
        self.start, count = _integer(position), tokens.shape[1]
        end = self.start + count
        _promise(self.start >= 0, self.start < self.program.context, end <= self.program.context)
        self.count, self.tokens = count, tokens
        self.masks: dict[int, tuple[Any, Any, Tensor]] = {}
        self.rows = {
            name: self.kept(name, "table").narrow(0, self.start, count).view(1, -1, 1, width)
            for name, table in self.program.tables.items()
            for width in [table.shape[1]]
        }

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Runs the program on tokens whose first position is the number of cached tokens."""
        self.begin(tokens, position)
        values: dict[fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node.target is dialect.SIZE:
                continue
            given = [values.get(a) if isinstance(a, fx.Node) else a for a in node.args]
            handler = self.handlers.get(node.target)
            if handler is None:
                raise ExportError(
                    f"ExecuTorch's exporter cannot take {node.target}: EdgeForge has no handler "
                    f"for it"
                )
            values[node] = handler(self, node, given)
        result = values[self.program.output()]
        assert isinstance(result, Tensor)
        return result

    def window(self, size: int) -> tuple[Any, Any, Tensor]:
        """The visible tokens of a window of this size.

        Returns:
            The position of the first token that the new tokens see, the number of tokens from
            there on, and the mask ``float32[t, seen]``: 0 where ``i - size < j <= i``, else so low
            that exp gives 0. Attention is given only these tokens of a cache: older ones are not
            visible, and positions after the last token hold no numbers yet.
        """
        if size not in self.masks:
            # The graph computes this number; torch's type annotations have only int and float.
            first: Any = torch.sym_max(self.start - (size - 1), 0)  # type: ignore[no-untyped-call]
            seen = self.start + self.count - first
            longest = min(self.program.context, size - 1 + self.limit)
            _promise(seen >= 1, seen <= longest, first >= 0, first + seen <= self.program.context)
            numbers = self.kept("numbers", "table")
            rows = numbers.narrow(0, self.start, self.count).view(-1, 1)
            distance = rows - numbers.narrow(0, first, seen).view(1, -1)
            near = torch.logical_and(distance >= 0, distance < size)
            self.masks[size] = first, seen, torch.where(near, 0.0, _HIDDEN)
        return self.masks[size]


def _integer(tensor: Tensor) -> Any:
    """A number that the graph computes from a tensor; torch's annotations say int or float."""
    return tensor[0].item()


def _promise(*conditions: Any) -> None:
    """Tells torch.export the conditions that hold for numbers it does not know."""
    for condition in conditions:
        torch._check(condition)  # type: ignore[no-untyped-call]


def _buffer_name(name: str, part: str) -> str:
    return f"{name} {part}".replace(".", "_").replace(" ", "__")


Handler = Callable[[StockModule, fx.Node, list[Any]], Any]
"""Takes the module, a node and its arguments' values, and returns the node's value."""


def _embedding(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    return F.embedding(state.tokens, state.part(node, 1, "value"))


def _quant_embedding(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    format = QuantizedCall.of(node).integers
    kernels, half = torch.ops.quantized_decomposed, format.implicit_zero_point
    look_up = kernels.embedding_4bit if format.bits == 4 else kernels.embedding_byte
    table = state.part(node, 1, "rows"), state.part(node, 1, "row scale")
    return look_up.dtype(*table, None, -half, half - 1, state.tokens, dtype=torch.float32)


def _linear(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    return F.linear(given[0], state.part(node, 1, "value"))


def _quant_linear(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    """Rounds each token's activations to 8 bits, then multiplies by dequantized weights."""
    kernels, x = torch.ops.quantized_decomposed, given[0]
    scale, zero = kernels.choose_qparams_per_token_asymmetric(x, torch.int8)
    bounds = -128, 127, torch.int8
    x = kernels.quantize_per_token(x, scale, zero, *bounds)
    x = kernels.dequantize_per_token(x, scale, zero, *bounds, torch.float32)
    return _weight_only(state, node, [x])


def _weight_only(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    """Multiplies unrounded activations by dequantized weights."""
    kernels, format = torch.ops.quantized_decomposed, QuantizedCall.of(node).integers
    half = format.implicit_zero_point
    parts = [state.part(node, 1, part) for part in ("codes", "scale", "zero")]
    if format.group_size is None:
        wide = kernels.dequantize_per_channel(*parts, 0, -half, half - 1, torch.int8)
    else:
        limits = -half, half - 1, torch.int8, format.group_size, torch.float32
        wide = kernels.dequantize_per_channel_group(*parts, *limits)
    return F.linear(given[0], wide)


def _mean(state: StockModule, x: Tensor) -> Tensor:
    """The mean as a product with a row of 1/n; the delegate would not take a mean."""
    return F.linear(x, state.kept(str(x.shape[-1]), "mean"))


def _rms_norm(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    x = given[0]
    normed: Tensor = x * torch.rsqrt(_mean(state, x * x) + given[2]) * state.part(node, 1, "value")
    return normed


def _layer_norm(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    x: Tensor = given[0] - _mean(state, given[0])
    x = x * torch.rsqrt(_mean(state, x * x) + given[3])
    call = LayerNormCall.of(node)
    if call.weight is not None:
        x = x * state.part(node, 1, "value")
    return x if call.bias is None else x + state.part(node, 2, "value")


def _bias(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0] + state.part(node, 1, "value")


def _gelu(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    """GELU; the form with a tanh is composed, because the delegate would not take it."""
    x: Tensor = given[0]
    if given[1] == "none":
        return F.gelu(x)
    root = math.sqrt(2 / math.pi)
    return x * (torch.tanh(x * (x * x * (root * 0.044715) + root)) * 0.5 + 0.5)


def _scale(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0] * given[1]


def _softcap(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return torch.tanh(given[0] * (1 / given[1])) * given[1]


def _clamp(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0].clamp(-given[1], given[1])


def _rope(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    cos, sin = (
        state.rows[state.program.inputs[node_argument(node, index).name].name] for index in (1, 2)
    )
    half, x = cos.shape[-1], given[0]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned + ([rest] if rest.shape[-1] else []), -1)


def _attention(state: StockModule, node: fx.Node, given: list[Any]) -> Tensor:
    q, k, v = given[:3]
    call = AttentionCall.of(node)
    caches = [state.part(node, 3, "cache"), state.part(node, 4, "cache")]
    for new, cache in zip((k, v), caches, strict=True):
        torch.ops.llama.update_cache(new, cache, state.start)
    position, mask = state.start, None
    if call.window:
        first, seen, mask = state.window(call.window)
        position = state.start - first
        caches = [cache.narrow(1, first, seen) for cache in caches]
    out = torch.ops.llama.custom_sdpa(q, *caches, position, mask, 0.0, mask is None, call.scale)
    mixed: Tensor = out.reshape(1, -1, q.shape[2] * q.shape[3])
    return mixed


def _view(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0].view([dim if isinstance(dim, int) else -1 for dim in given[1]])


def _last(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0][:, given[2] :]


def _get(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    return given[0][given[1]]


def _split(state: StockModule, node: fx.Node, given: list[Any]) -> list[Any]:
    """Slices the parts, because delegates take slices; a split would end a delegate."""
    parts, start = [], 0
    for size in given[1]:
        parts.append(given[0][..., start : start + size])
        start += size
    return parts


def _plain(state: StockModule, node: fx.Node, given: list[Any]) -> Any:
    assert callable(node.target)
    return node.target(*given)


HANDLERS: Mapping[object, Handler] = {
    dialect.EMBEDDING: _embedding,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.RMS_NORM: _rms_norm,
    dialect.LAYER_NORM: _layer_norm,
    dialect.BIAS: _bias,
    dialect.GELU: _gelu,
    dialect.SCALE: _scale,
    dialect.SOFTCAP: _softcap,
    dialect.CLAMP: _clamp,
    dialect.ROPE: _rope,
    dialect.ATTENTION: _attention,
    dialect.VIEW: _view,
    dialect.LAST: _last,
    dialect.GET: _get,
    dialect.ADD: _plain,
    dialect.MUL: _plain,
    dialect.SILU: _plain,
    dialect.SPLIT: _split,
}


class VulkanModule(StockModule):
    """One method for Vulkan's kernels, which multiply with float activations."""

    @property
    def handlers(self) -> Mapping[object, Handler]:
        """The handler of each operator."""
        return {**HANDLERS, dialect.QUANT_LINEAR: _weight_only}
