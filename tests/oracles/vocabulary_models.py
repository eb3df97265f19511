"""Models of the specs of `tests.oracles.vocabulary`: random tensors in a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.families.spec import ModelSpec
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.model.model import Model
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner
from quant.program.program import Program
from tests.oracles.vocabulary import CONTEXT

TOKENS = torch.arange(40, dtype=torch.int64) * 7 % 50


def small_model(spec: ModelSpec, folder: Path, seed: int = 0) -> Model:
    """Writes random tensors for a spec and opens them, without a family's configuration."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for weight in spec.weights.values():
        for piece in weight.pieces:
            made = torch.randn(piece.tensor_shape, generator=random) / piece.shape[-1] ** 0.5
            if weight.role in ("norm", "bias"):
                made = made.sign() * (0.2 + made.abs()) if weight.role == "bias" else made * 0.3
                made = made + 1 - weight.added if weight.role == "norm" else made
            tensors[piece.tensor] = made.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": spec.model_type}))
    checkpoint = Checkpoint.open(str(folder))
    return Model(checkpoint, spec, CheckpointWeights(checkpoint, spec))


_PROGRAMS: dict[int, tuple[ModelSpec, Program]] = {}


def program_of(spec: ModelSpec) -> Program:
    """A spec's program, traced once for all tests of a process; it must not be changed."""
    if id(spec) not in _PROGRAMS:  # the spec is kept, so that no other gets its id
        _PROGRAMS[id(spec)] = spec, trace(spec, CONTEXT)
    return _PROGRAMS[id(spec)][1]


def logits_of(model: Model, program: Program | None = None) -> torch.Tensor:
    """The reference's logits of a fixed text, ``float32[t, vocab]``."""
    traced = program_of(model.spec) if program is None else program
    weights = model.weights
    runner = ReferenceRunner(
        traced, lambda given: weights.float_weight(given.name), weights.float_rows
    )
    return next(iter(runner.logits([TOKENS])))
