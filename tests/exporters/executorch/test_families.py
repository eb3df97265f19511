"""Artifacts of every family: float, int4 and int8, in ExecuTorch's runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeforge.verification.bounds import DEFAULTS
from tests.oracles.tiny_families import CONFIGS, MIXTURES, RECURRENT
from tests.oracles.traced import difference

FLOAT = 2e-4  # of the range of the logits
SAME = 1e-4  # the same numbers by other runs
CONTEXT = 48
ROUNDED = DEFAULTS["executorch"][1]


HERE = CONFIGS | MIXTURES | RECURRENT
# Mixtures differ in who chooses experts, which is float: products with integers are the same, but
# those of attention heads.
INTEGERS = [*CONFIGS, "mixtral", "qwen2_moe", "jetmoe"]


@pytest.fixture(params=HERE)
def config(request) -> dict[str, object]:
    return HERE[request.param]


def test_float_artifacts_give_every_position_and_prefill_then_decode(config, pte, run_pte, tokens):
    made = pte(config)
    wanted = made.float_logits(tokens[:CONTEXT])
    with run_pte(made.folder) as session:
        assert difference(session.logits(tokens[:CONTEXT]), wanted) < FLOAT
        at = 0
        # Longer than a run takes, and past every window and original context.
        for size in (21, 1, 1, 12, 1, 1):
            at += size
            assert difference(session.extend(tokens[at - size : at]), wanted[at - 1]) < FLOAT
        session.reset()  # a second text finds nothing of the first
        assert difference(session.extend(tokens[:3]), wanted[2]) < FLOAT


def divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the next token's distributions, nats."""
    ours, theirs = (torch.from_numpy(x).double().log_softmax(-1) for x in (found, wanted))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize("family", INTEGERS)
def test_integer_artifacts_compute_with_the_stored_numbers(family, pte, run_pte, tokens, recipe):
    made = pte(HERE[family], recipe)
    wanted = made.quantized_logits(tokens[:CONTEXT])
    with run_pte(made.folder) as session:
        every = session.logits(tokens[:CONTEXT])
        assert divergence(every, wanted) < ROUNDED["lowering.kl_mean"].limit
        assert difference(session.extend(tokens[:30]), every[29]) < SAME
        assert difference(session.extend(tokens[30:31]), every[30]) < SAME


@pytest.mark.parametrize("family", ["gemma2", "lfm2", "phi", "qwen2"])  # of every kind of product
def test_products_without_rounded_activations_are_exact(family, pte, run_pte, tokens):
    made = pte(CONFIGS[family], "int4", activations="float")
    wanted = made.quantized_logits(tokens[:CONTEXT])
    with run_pte(made.folder) as session:
        assert difference(session.logits(tokens[:CONTEXT]), wanted) < FLOAT
