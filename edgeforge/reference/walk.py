"""Runs a program with the reference operators, with one weight in memory at a time.

Each operator runs on every block of tokens before the next one starts, so a weight is read once
for all blocks and then dropped. Memory is bounded by the largest weight and by the blocks'
activations, not by the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from device_harness.finite import described
from edgeforge.reference.choices import Following, router_places, routers
from quant.formats import packing
from quant.formats.formats import PaletteFormat
from quant.kernels import native
from quant.kernels.threads import single_threaded_torch, torch_pool
from quant.program import dialect
from quant.program.calls import QuantizedCall
from quant.program.head import head_of
from quant.program.program import Input, Program, node_argument
from quant.store.store import WeightStore
from quant.store.writer import StoreWriter

# Blocks are grouped until they hold this many tokens; each group reads every weight once.
GROUP_TOKENS = 8192
# Attention takes so many tokens of a long text at a time: its scores are as many as these times the
# tokens before them.
ATTENTION_TOKENS = 512

# So many bytes of a mapped store are read before its pages are dropped.
MAPPED_BYTES = 256 << 20

# A float head with more elements is read some rows at a time, again for each block: 64 M of them in
# float32 take 256 MB, and the heads of large vocabularies a gigabyte and more.
LARGE_HEAD = 1 << 26

WeightReader = Callable[[Input], Tensor]
"""Returns the value of an input of kind ``weight``."""

Values = dict[fx.Node, Any]
"""One block's values so far, by node; values that no later call needs are removed."""


class _Text(Values):
    """The values of a text whose choices of experts are recorded, or made for it."""

    following: Following


class Walk:
    """A program's calls in order; each is prepared once and then runs on any number of blocks.

    Args:
        program: a program in the float or the quantized dialect.
        read: returns a weight's value (`store_reader`, or a checkpoint's `float_weight`).
        rows: returns rows of a float embedding by token, so that the whole table is never in
            memory; None to read the table with ``read``.
        added: returns a matrix of a product with what an adapter adds to it, by the weight's name;
            None for no adapter.

    Attributes:
        order: the calls, in the program's order.
        last_use: for each call, the position in ``order`` of the last call that needs its value.
    """

    def __init__(
        self,
        program: Program,
        read: WeightReader,
        rows: Callable[[str, Tensor], Tensor] | None = None,
        added: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.program, self._read, self._rows, self._added = program, read, rows, added
        self.order = [n for n in program.graph.nodes if n.op == "call_function"]
        self._position = {node: index for index, node in enumerate(self.order)}
        self.last_use = {
            node: max((self._position.get(u, len(self.order)) for u in node.users), default=0)
            for node in self.order
        }

    def begin(self, block: Tensor, following: Following | None = None) -> Values:
        """Returns the values of a new block, which are its tokens.

        Args:
            block: ``int64[t]``.
            following: takes part in its choices of experts; None where they need not be known.
        """
        values = {node: block.reshape(1, -1) for node, _ in self.program.placeholders("tokens")}
        if following is None:
            return values
        text = _Text(values)
        text.following = following
        return text

    def advance(self, node: fx.Node, blocks: Sequence[Values], pool: ThreadPoolExecutor) -> None:
        """Runs one call on every block, and drops the values that no later call needs."""
        run = self.prepare(node)

        def step(values: Values) -> None:
            values[node] = run(values)
            self.forget(node, values)

        list(pool.map(step, blocks))

    def forget(self, node: fx.Node, values: Values) -> None:
        """Drops the values that no call after this one needs."""
        for used in node.all_input_nodes:
            if self.last_use.get(used, -1) == self._position[node]:
                del values[used]

    def prepare(self, node: fx.Node) -> Callable[[Values], Any]:
        """Reads and unpacks a call's weights; returns a function that runs it on one block."""
        target = node.target
        if target is dialect.EMBEDDING and self._rows is not None:
            rows, name = self._rows, self.program.inputs[node_argument(node, 1).name].name
            return lambda values: rows(name, values[node_argument(node, 0)])
        if target is dialect.QUANT_LINEAR:
            # The operator would unpack its weight again for every block; here it is unpacked once.
            unpacked = self.matrix(node)

            def run_unpacked(values: Values) -> Any:
                with torch.no_grad():
                    return F.linear(values[node_argument(node, 0)], unpacked)

            return run_unpacked
        if target is dialect.ATTENTION:
            return lambda values: self._attend(node, values)
        if target in dialect.ROUTES:
            return lambda values: _route(node, values)
        weights = self.weights_of(node)
        assert callable(target)

        def run(values: Values) -> Any:
            with torch.no_grad():
                return target(*self._arguments(node, values, weights))

        return run

    def _attend(self, node: fx.Node, values: Values) -> Tensor:
        """Runs attention on a block, some tokens after the other; the caches hold those before."""
        q, k, v, k_cache, v_cache, _, *rest = self._arguments(node, values, {})
        found = []
        with torch.no_grad():
            for start in range(0, q.shape[1], ATTENTION_TOKENS):
                q_, k_, v_ = (each[:, start : start + ATTENTION_TOKENS] for each in (q, k, v))
                position = torch.tensor([start])
                found.append(dialect.ATTENTION(q_, k_, v_, k_cache, v_cache, position, *rest))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def prepare_head(self, node: fx.Node) -> Callable[[Values], Any]:
        """As `prepare`, for the call that gives the logits; it never holds all of a large head.

        That holds of float heads whose rows can be read.
        """
        given = self.program.inputs.get(node_argument(node, 1).name)
        rows = self._rows
        if node.target is not dialect.LINEAR or rows is None or given is None:
            return self.prepare(node)
        if self._added is not None:  # what is added is of the whole matrix
            return self.prepare(node)
        count, columns = node_argument(node, 1).meta["val"].shape
        if count * columns <= LARGE_HEAD:
            return self.prepare(node)
        step, name = max(1, LARGE_HEAD // 4 // columns), given.name

        def run(values: Values) -> Any:
            entering = values[node_argument(node, 0)]
            logits = torch.empty(*entering.shape[:-1], count)
            with torch.no_grad():
                for start in range(0, count, step):
                    some = rows(name, torch.arange(start, min(start + step, count))[None])[0]
                    logits[..., start : start + step] = F.linear(entering, some)
            return logits

        return run

    def prepare_logits(self) -> Callable[[Values], Tensor]:
        """As `prepare_head`, with the calls after the head: its bias, a factor, a softcap."""
        head = head_of(self.program)
        first = self.prepare_head(head)
        after = self.order[self._position[head] + 1 :]
        rest = [(node, self.prepare(node)) for node in after]

        def run(values: Values) -> Tensor:
            made, last = {head: first(values)}, head
            for node, step in rest:
                made = {node: step(made)}
                last = node
            logits: Tensor = made[last]
            return logits

        return run

    def matrix(self, node: fx.Node) -> Tensor:
        """Reads the matrix of a product with a quantized weight: ``float32[rows, columns]``."""
        weights, call = self.weights_of(node), QuantizedCall.of(node)
        codes, scale, format = weights[call.codes], weights[call.scale], call.format
        zero_point = None if call.zero_point is None else weights[call.zero_point]
        if isinstance(format, PaletteFormat):
            found = packing.look_up(codes, scale, format)
        else:
            found = native.unpack(codes, scale, zero_point, format)
        if self._added is None:
            return found
        return self._added(self.program.inputs[call.codes.name].name, found)

    def weights_of(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Reads the weights and tables that a call takes, by the inputs that name them."""
        found = {}
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                given = self.program.inputs[source.name]
                if given.kind == "weight":
                    # A store holds a vector as a matrix of one row.
                    value = self._read(given).reshape(source.meta["val"].shape)
                    if self._added is not None and node.target is dialect.LINEAR:
                        value = self._added(given.name, value)
                    found[source] = value
                elif given.kind == "table":
                    found[source] = self.program.tables[given.name]
        return found

    def _arguments(
        self, node: fx.Node, values: Values, weights: dict[fx.Node, Tensor]
    ) -> tuple[Any, ...]:
        def value(source: fx.Node) -> object:
            if source in weights:
                return weights[source]
            if source in values:
                return values[source]
            given = self.program.inputs[source.name]
            if given.kind == "position":
                return torch.zeros(1, dtype=torch.int64)
            if given.kind in (
                "recent",
                "memory",
            ):  # a fresh one for each block, because the call changes it
                return torch.zeros(tuple(map(int, source.meta["val"].shape)))
            # Every block is a text of its own that begins at position 0, so an empty cache as long
            # as the block is enough.
            _, heads, _, width = source.meta["val"].shape
            length = values[node_argument(node, 0)].shape[1]
            return torch.zeros(1, heads, length, width)

        return _replace_nodes(node, value)


class ReferenceRunner:
    """Computes a program's logits with the reference operators; the arguments are `Walk`'s."""

    def __init__(
        self,
        program: Program,
        read: WeightReader,
        rows: Callable[[str, Tensor], Tensor] | None = None,
        added: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.program = program
        self._walk = Walk(program, read, rows, added)

    @property
    def routers(self) -> list[fx.Node]:
        """The program's routers, in order; none where it has no mixture of experts."""
        return routers(self._walk.order)

    @property
    def router_places(self) -> list[str]:
        """Where each of the routers is, in words."""
        return router_places(self.program)

    def logits(
        self, blocks: Sequence[Tensor], following: Sequence[Following] | None = None
    ) -> Iterator[Tensor]:
        """Computes the logits of every position of each block; each block is a text of its own.

        Args:
            blocks: ``int64[t]`` each, of any length up to the context.
            following: for each block, what takes part in its choices of experts.

        Yields:
            ``float32[t, vocab]`` for each block, in order.
        """
        done = 0
        for group in grouped(blocks):
            given = None if following is None else following[done : done + len(group)]
            yield from self._run(group, given)
            done += len(group)

    def logits_at(
        self, block: Tensor, positions: Tensor, following: Following | None = None
    ) -> Tensor:
        """Computes the logits of a few positions of a text, so that a long one takes little memory.

        Args:
            block: ``int64[t]``.
            positions: the places in the block, ``int64[n]``.
            following: takes part in the text's choices of experts.

        Returns:
            ``float32[n, vocab]``.
        """
        walk, head = self._walk, head_of(self.program)
        values = walk.begin(block, following)
        # One text alone: the threads of the operators may as well work.
        for node in walk.order:
            if node is head:
                break
            values[node] = walk.prepare(node)(values)
            walk.forget(node, values)
        # The head works token by token, so it needs no others.
        read = node_argument(head, 0)
        return walk.prepare_logits()({read: values[read][:, positions]})[0]

    def first_not_finite(self, block: Tensor) -> str | None:
        """Names the operator that gives the first NaN or infinite value of a text.

        Args:
            block: ``int64[t]``.

        Returns:
            A phrase for a message (`device_harness.finite.described`); None for nothing.
        """
        walk, weights = self._walk, []
        values = walk.begin(block)
        for node in walk.order:
            given = [
                self.program.inputs[n.name] for n in node.all_input_nodes if n.op == "placeholder"
            ]
            weights += [each.name for each in given if each.kind == "weight"]
            found = values[node] = walk.prepare(node)(values)
            parts = found if isinstance(found, list | tuple) else [found]
            if not all(bool(torch.isfinite(p).all()) for p in parts if isinstance(p, Tensor)):
                return described(str(node.target), weights)
            if node is not self.program.output():
                walk.forget(node, values)
        return None

    def _run(self, blocks: list[Tensor], following: Sequence[Following] | None) -> Iterator[Tensor]:
        walk, head = self._walk, head_of(self.program)
        each = [None for _ in blocks] if following is None else following
        values = [walk.begin(block, own) for block, own in zip(blocks, each, strict=True)]
        with block_pool() as pool:
            for node in walk.order:
                if node is head:
                    break
                walk.advance(node, values, pool)
        run = walk.prepare_logits()
        for known in values:
            yield run(known)[0]


def grouped(blocks: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the blocks that are walked together, and read every weight once."""
    group: list[Tensor] = []
    for block in blocks:
        group.append(block)
        if sum(map(len, group)) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _route(node: fx.Node, values: Values) -> Tensor:
    """Runs a router on a block, as what follows the block's choices says."""
    assert callable(node.target)
    logits = values[node_argument(node, 0)]
    with torch.no_grad():
        if isinstance(values, _Text):
            return values.following.weights(node, logits)
        made: Tensor = node.target(logits, *node.args[1:])
        return made


@contextmanager
def block_pool() -> Iterator[ThreadPoolExecutor]:
    """Yields threads that take one block each, so that they never wait within an operator."""
    count = torch.get_num_threads()
    with single_threaded_torch(), torch_pool(count, "reference") as pool:
        yield pool


def _replace_nodes(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """Returns a node's arguments with every node in them replaced by its value."""
    arguments: Any = fx.node.map_arg(node.args, value)
    return tuple(arguments)


def store_reader(store: WeightStore | StoreWriter) -> WeightReader:
    """Returns a reader of a store's weights; the store may still be filled while it is read.

    A part is a tensor over the mapped file, whose pages count as this process's memory: they are
    dropped now and then, and read again where a tensor is still in use.
    """
    since = 0

    def read(given: Input) -> Tensor:
        nonlocal since
        part = store.part(given.name, given.part)
        since += part.nbytes
        if since > MAPPED_BYTES and isinstance(store, WeightStore):
            store.release()
            since = 0
        return part.float() if given.part == "value" else part

    return read
