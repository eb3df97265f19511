"""Results with everything that an output may meet, names of strangers among it."""

from __future__ import annotations

import math

import pytest

from edgeforge.gate.result import ArtifactResult, Finding, GateResult

HOSTILE = 'out/<a & "b">|\x1b[2J%0A::error::\n`x`'

VIOLATION = Finding(
    metric="total.kl_mean",
    outcome="failed",
    kind="bound",
    message="total.kl_mean is 0.0362, and must be at most 0.02",
    value=0.0362,
    low=0.031,
    high=0.041,
    sense="at most",
    limit=0.02,
    source="rule 1 (target onnx)",
    baseline=0.018,
    where=("block 3, token 17", "model.layers.2.mlp.down_proj.weight"),
)
REGRESSION = Finding(
    metric="total.kl_mean",
    outcome="failed",
    kind="baseline",
    message="total.kl_mean is 0.0362 and was 0.018",
    value=0.0362,
    sense="at most",
    limit=0.00018,
    source="the baseline",
    baseline=0.018,
    change=0.0182,
    change_low=0.0171,
    change_high=0.0195,
)
DOUBTFUL = Finding(
    metric="perplexity_ratio",
    outcome="doubtful",
    kind="bound",
    message="perplexity_ratio is 1.02; about 16,000 tokens would settle it",
    value=1.02,
    low=1.01,
    high=1.03,
    sense="at most",
    limit=1.015,
    source="the policy",
)
ALLOWED = Finding(
    metric="meaning.window",
    outcome="allowed",
    kind="fact",
    message="the window is 64 | 128 <b>; the policy allows it: prompts are short",
    where=("layer 3",),
)
NOT_FINITE = Finding(
    metric="lowering.kl_mean",
    outcome="failed",
    kind="bound",
    message="lowering.kl_mean is nan",
    value=math.nan,
    sense="at most",
    limit=0.02,
    source="the target's own bound",
)
PASSED = Finding(
    metric="size.bytes",
    outcome="passed",
    kind="bound",
    message="size.bytes is 1e+06",
    value=1e6,
    sense="at most",
    limit=5e6,
    source="the policy",
)


def artifact(path: str, *findings: Finding, fresh: bool = False) -> ArtifactResult:
    return ArtifactResult(
        path=path,
        folder=path,
        target="onnx",
        recipe="int4",
        model="demo",
        fresh=fresh,
        verified_because=() if fresh else ("it has no report",),
        measured_on="8,192 tokens of a text",
        findings=findings,
    )


def result(*artifacts: ArtifactResult, **fields) -> GateResult:
    given = {
        "policy": "edgeforge-policy.yaml",
        "baseline": "baseline.json",
        "baseline_updated": False,
        "artifacts": artifacts,
        "notes": ("a note",),
        "seconds": 1.25,
    }
    return GateResult(**(given | fields))


@pytest.fixture(scope="session")
def failed() -> GateResult:
    """Two artifacts that fall short, one with a name that a stranger chose."""
    return result(
        artifact("out/onnx", PASSED, VIOLATION, REGRESSION, DOUBTFUL, ALLOWED),
        artifact(HOSTILE, NOT_FINITE, PASSED, fresh=True),
    )


@pytest.fixture(scope="session")
def sound() -> GateResult:
    """One artifact that keeps to everything."""
    return result(artifact("out/onnx", PASSED, fresh=True), baseline=None, policy=None, notes=())


@pytest.fixture(params=["failed", "sound"])
def any_result(request) -> GateResult:
    """Each of them."""
    return request.getfixturevalue(request.param)
