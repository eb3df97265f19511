"""Runs what is under test: a folder opened, traced, and its program run by its own operators."""

from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import fx

from edgeforge.model import trace
from edgeforge.model.model import Model, open_model
from edgeforge.reference.walk import ReferenceRunner, WeightReader
from quant.program.dialect import check_float
from quant.program.program import Program
from quant.program.states import StateKind

# The bound on FLOAT logits: this share of the range of the oracle's.
TOLERANCE = 2e-4


def model(folder: Path, **options) -> Model:
    return open_model(str(folder), **options)


def reader(opened: Model):
    return lambda given: opened.weights.float_weight(given.name)


class ReferenceSession:
    """A program's own operators, with caches that live from call to call; it holds every weight."""

    def __init__(self, program: Program, read: WeightReader) -> None:
        self.program = program
        self._fixed: dict[fx.Node, torch.Tensor] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                given = program.inputs[node.name]
                if given.kind == "weight":
                    self._fixed[node] = read(given).reshape(node.meta["val"].shape)
                elif given.kind == "table":
                    self._fixed[node] = program.tables[given.name]
        self.reset()

    def reset(self) -> None:
        """Forgets all positions."""
        self._length = 0
        for kind in get_args(StateKind):
            for node, _ in self.program.placeholders(kind):
                self._fixed[node] = torch.zeros(node.meta["val"].shape)

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Appends ``int64[t]`` tokens and returns all their logits, ``float32[t, vocab]``."""
        given = {
            "tokens": torch.from_numpy(tokens).reshape(1, -1),
            "position": torch.tensor([self._length]),
        }
        values: dict[fx.Node, object] = dict(self._fixed)
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node not in values:
                values[node] = given[self.program.inputs[node.name].kind]
            elif node.op == "call_function":
                values[node] = node.target(*fx.node.map_arg(node.args, values.__getitem__))
        self._length += len(tokens)
        return values[self.program.output()][0].numpy()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of every position of a fresh text, ``float32[t, vocab]``."""
        self.reset()
        return self.extend(tokens)


def session(opened: Model, context: int) -> ReferenceSession:
    program = trace.trace(opened.spec, context)
    check_float(program)
    return ReferenceSession(program, reader(opened))


def runner(opened: Model, context: int) -> ReferenceRunner:
    return ReferenceRunner(
        trace.trace(opened.spec, context), reader(opened), rows=opened.weights.float_rows
    )


def tokens(count: int, vocab: int, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count)


def difference(ours, oracle) -> float:
    """Largest absolute difference as a share of the range of the oracle's logits."""
    ours, oracle = (torch.as_tensor(x).double() for x in (ours, oracle))
    assert ours.shape == oracle.shape
    assert torch.isfinite(oracle).all()
    return ((ours - oracle).abs().max() / (oracle.max() - oracle.min())).item()
