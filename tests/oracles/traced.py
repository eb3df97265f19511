"""Runs what is under test: a folder opened, traced, and its program run by its own operators."""

from pathlib import Path

import numpy as np
import torch

from edgeforge.model import trace
from edgeforge.model.model import Model, open_model
from edgeforge.reference.walk import ReferenceRunner, ReferenceSession
from quant.program.dialect import check_float

# The bound on FLOAT logits: this share of the range of the oracle's.
TOLERANCE = 2e-4


def model(folder: Path, **options) -> Model:
    return open_model(str(folder), **options)


def reader(opened: Model):
    return lambda given: opened.weights.float_weight(given.name)


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
