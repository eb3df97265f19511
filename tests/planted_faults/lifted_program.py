"""A program as the values that a target's reader would lift from a file without a fault."""

from __future__ import annotations

import numpy as np
from torch import fx

from exporters.lifted import (
    Attention,
    Bias,
    Cache,
    Clamp,
    Columns,
    Embedding,
    EntryPoint,
    Gelu,
    Last,
    LayerNorm,
    Linear,
    Norm,
    Probe,
    Product,
    Recent,
    Rope,
    Scaled,
    ShortConv,
    Sigmoid,
    Silu,
    Softcap,
    StoredFormat,
    StoredWeight,
    Sum,
    Tokens,
    Value,
    probes_of,
)
from exporters.lifted_mixture import (
    ChosenSlots,
    ChosenTokens,
    Combine,
    Route,
    RouteSparseMixer,
    Slots,
)
from exporters.lifted_recurrent import (
    Function,
    FunctionName,
    Gain,
    Previous,
    Recurrence,
    UnitNorm,
)
from quant.program import dialect
from quant.program.calls import (
    AttentionCall,
    FactorCall,
    GetCall,
    LayerNormCall,
    NormCall,
    RecurrenceCall,
    ShortConvCall,
    SplitCall,
    TokenShiftCall,
)
from quant.program.program import Program, node_argument, shape_of

FUNCTIONS: dict[object, FunctionName] = {
    dialect.TANH: "tanh",
    dialect.RELU: "relu",
    dialect.EXP: "exp",
    dialect.SOFTPLUS: "softplus",
}


def lifted_program(program: Program) -> EntryPoint:
    """Lifts a program in the float dialect, or one of the last tokens; vectors hold zeros."""
    probes = probes_of(program.context, (1, 8))
    reader = _Reader(program, probes)
    for node in program.graph.nodes:
        if node.op == "call_function":
            made = reader.lifted(node)
            if made is not None:
                reader.values[node] = made
    return EntryPoint("all", reader.values[program.output()], probes)


class _Reader:
    def __init__(self, program: Program, probes: tuple[Probe, ...]) -> None:
        self.program, self.probes = program, probes
        self.values: dict[fx.Node, Value] = {}
        self.rows = tuple(tuple(range(p.start, p.start + p.count)) for p in probes)
        self.begins = tuple(probe.start == 0 for probe in probes)
        self.tables = {name: table.numpy() for name, table in program.tables.items()}

    def lifted(self, node: fx.Node) -> Value | None:
        name, target = node.name, node.target
        if target is dialect.EMBEDDING:
            return Embedding(name, self.weight(node, 1))
        if target in (dialect.SIZE, dialect.SPLIT):
            return None
        if target is dialect.GET:
            call = GetCall.of(node)
            split = SplitCall.of(call.split)
            start = sum(split.sizes[: call.index])
            return Columns(name, self.of(split.x), start, start + split.sizes[call.index])
        if target is dialect.ATTENTION:
            return self.attention(node)
        first = self.of(node_argument(node, 0))
        if target is dialect.VIEW:
            return first
        if target is dialect.LAST:
            return Last(name, first, -node.args[2])
        if target is dialect.LINEAR:
            return Linear(name, first, self.weight(node, 1), "float32")
        if target is dialect.BIAS:
            return Bias(name, first, self.weight(node, 1), np.zeros(1))
        if target is dialect.RMS_NORM:
            epsilon = NormCall.of(node).epsilon
            return Norm(name, first, self.weight(node, 1), np.zeros(1), epsilon)
        if target is dialect.LAYER_NORM:
            norm = LayerNormCall.of(node)
            scale = None if norm.weight is None else self.weight(node, 1)
            shift = None if norm.bias is None else self.weight(node, 2)
            zero = np.zeros(1)
            return LayerNorm(name, first, scale, zero, shift, zero, norm.epsilon)
        if target is dialect.ROPE:
            cos, sin = (self.table(node, index) for index in (1, 2))
            return Rope(name, first, cos, sin, self.rows)
        if target is dialect.SHORT_CONV:
            state = self.state(ShortConvCall.of(node).recent)
            recent = Recent(state, state, self.begins)
            return ShortConv(name, first, self.weight(node, 1), np.zeros(1), recent)
        if target is dialect.TOKEN_SHIFT:
            state = self.state(TokenShiftCall.of(node).recent)
            return Previous(name, first, Recent(state, state, self.begins))
        if target is dialect.RECURRENCE:
            return self.recurrence(node)
        if target is dialect.GAIN:
            return Gain(name, first, self.weight(node, 1), np.zeros(1))
        if target is dialect.L2_NORM:
            return UnitNorm(name, first, node.args[1])
        if target in FUNCTIONS:
            return Function(name, first, FUNCTIONS[target])
        if target is dialect.GELU:
            return Gelu(name, first, node.args[1] == "tanh")
        if target is dialect.SILU:
            return Silu(name, first)
        if target is dialect.SIGMOID:
            return Sigmoid(name, first)
        if target in dialect.MIXTURE:
            return self.mixture(node, first)
        if target in (dialect.ADD, dialect.MUL):
            both = first, self.of(node_argument(node, 1))
            return Sum(name, both) if target is dialect.ADD else Product(name, both)
        kinds = {dialect.SCALE: Scaled, dialect.SOFTCAP: Softcap, dialect.CLAMP: Clamp}
        return kinds[target](name, first, FactorCall.of(node).number)

    def attention(self, node: fx.Node) -> Attention:
        call = AttentionCall.of(node)
        _, _, heads, width = shape_of(call.q)
        keys, values = (
            Cache(self.state(cache), self.state(cache), self.program.context, self.rows)
            for cache in (call.key_cache, call.value_cache)
        )
        return Attention(
            node.name,
            *(self.of(each) for each in (call.q, call.k, call.v)),
            (heads, shape_of(call.k)[2], width),
            call.scale,
            keys,
            values,
            tuple(_seen(probe, call.window) for probe in self.probes),
            call.softcap,
        )

    def recurrence(self, node: fx.Node) -> Recurrence:
        call, state = RecurrenceCall.of(node), self.state(RecurrenceCall.of(node).memory)
        read = [self.of(each) for each in (call.query, call.key, call.value)]
        fixed, zeros = call.constant_decay, np.zeros(1)
        return Recurrence(
            node.name,
            *read,
            self.weight(node, 3) if fixed else self.of(call.log_decay),
            zeros if fixed else None,
            None if call.bonus is None else self.weight(node, 4),
            None if call.bonus is None else zeros,
            None if call.beta is None else self.of(call.beta),
            call.shape,
            Recent(state, state, self.begins),
        )

    def mixture(self, node: fx.Node, first: Value) -> Value:
        name, target = node.name, node.target
        if target is dialect.ROUTE:
            return Route(name, first, node.args[1], node.args[2])
        if target is dialect.ROUTE_SPARSE_MIXER:
            return RouteSparseMixer(name, first, node.args[1])
        if target is dialect.CHOSEN:
            return ChosenTokens(name, first, self.of(node_argument(node, 1)), node.args[2])
        if target is dialect.CHOSEN_SLOTS:
            return ChosenSlots(name, first, self.of(node_argument(node, 1)), *node.args[2:])
        terms = tuple(enumerate(self.of(result) for result in node.args[1]))
        if target is dialect.SLOTS:
            return Slots(name, first, terms, *node.args[2:])
        return Combine(name, first, terms)

    def of(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return Tokens(node.name)
        return self.values[node]

    def weight(self, node: fx.Node, index: int) -> StoredWeight:
        name = self.program.inputs[node_argument(node, index).name].name
        return StoredWeight(name, StoredFormat("fp32"))

    def table(self, node: fx.Node, index: int) -> np.ndarray:
        return self.tables[self.program.inputs[node_argument(node, index).name].name]

    def state(self, node: fx.Node) -> str:
        """A state's name as the targets shorten it: ``3.key``, ``3.recent``, ``3.mlp_recent``."""
        words = self.program.inputs[node.name].name.split(".")
        if words[3] == "mlp":
            return f"{words[2]}.mlp_{words[-1]}"
        return f"{words[2]}.{ {'k_cache': 'key', 'v_cache': 'value'}.get(words[-1], words[-1]) }"


def _seen(probe: Probe, window: int) -> np.ndarray:
    own = np.arange(probe.start, probe.start + probe.count)[:, None]
    keys = np.arange(probe.start + probe.count)[None]
    seen = keys <= own
    return seen & (keys > own - window) if window else seen
