"""Measures the KL divergence that storing a single weight in a format causes.

FLOAT runs once over the text, call by call. Where a weight is first used the run forks: the rest of
the program runs with only that weight as the format stores it, and the divergence of its logits
from FLOAT's is the format's cost. Calls before the weight do not run again, and a weight is read
when it is used, so memory is bounded by the largest weight and by the activations of the text.

For a large model only one format of each weight is measured by a fork. The others are estimated:
divergence is quadratic in a small error, so it grows as the squared error of the weight's outputs,
which takes one matrix product. A layer's experts share their forks
(`edgeforge.planning.expert_costs`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor, fx

from edgeforge.cache import read_record, write_record
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.planning.expert_costs import ExpertLayers, MatrixErrors, costs_of
from edgeforge.reference.walk import Values, Walk, block_pool
from quant.errors import QuantizationError
from quant.plans.plan import Assignment
from quant.program import dialect
from quant.program.program import Input, Program, node_argument
from quant.store.fill import stored_values

SENSITIVITY_VERSION: Final = 3
# In models with more parameters, formats are estimated from one measured fork per weight.
MEASURED_PARAMETERS: Final = 50_000_000
# The cost of a format with which logits are NaN or infinite, nats per token: more than any other's.
UNUSABLE: Final = 1e6
# Weights stay in memory between forks if all of them in float32 take at most this many bytes.
_LARGEST_FILE: Final = 64 << 20
_KEPT_WEIGHTS: Final = 256 << 20

Method = Literal["measured", "estimated"]
Candidates = Mapping[str, Sequence[Assignment]]
"""By weight, the assignments to measure."""


@dataclass(frozen=True)
class Sensitivity:
    """Costs of formats, weight by weight.

    Attributes:
        costs: KL divergence by weight and format name, nats per token.
        method: ``measured`` by a fork for each format, or ``estimated`` from one fork per weight.
        tokens: number of the text's tokens.
        version: version of this record.
    """

    costs: Mapping[str, Mapping[str, float]]
    method: Method
    tokens: int
    version: int = SENSITIVITY_VERSION


def sensitivity(
    weights: CheckpointWeights,
    program: Program,
    candidates: Candidates,
    blocks: Sequence[Sequence[int]],
    source_digest: str,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> Sensitivity:
    """Returns the costs of all candidates, from the cache or measured now.

    Args:
        weights: the checkpoint's weights.
        program: a program in the float dialect.
        candidates: the assignments to measure, by weight.
        blocks: the text; each block is a text of its own.
        source_digest: digest of the checkpoint's files.
        cache: folder of sensitivities that were measured before.
        progress: called with the number of weights done and the number of all weights.

    Raises:
        QuantizationError: FLOAT's logits are NaN or infinite on the text.
    """
    facts = {
        "version": SENSITIVITY_VERSION,
        "source": [source_digest, weights.mapping_digest()],
        "blocks": [list(block) for block in blocks],
        "candidates": {
            name: [[a.format.name, a.algorithm] for a in given]
            for name, given in candidates.items()
        },
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]
    file = cache / f"{key}.json"
    found = _read(file, candidates)
    if found is not None:
        return found
    method: Method = (
        "measured" if weights.spec.num_parameters <= MEASURED_PARAMETERS else "estimated"
    )
    tokens = [torch.tensor(block, dtype=torch.int64) for block in blocks]
    costs = _Forks(weights, program, tokens, progress).run(candidates, method)
    made = Sensitivity(costs, method, sum(map(len, tokens)))
    weights.checkpoint.require_unchanged()  # the key names the bytes that were measured
    write_record(file, asdict(made))
    return made


def plan_divergence(
    weights: CheckpointWeights,
    program: Program,
    assignments: Mapping[str, Assignment],
    blocks: Sequence[Sequence[int]],
) -> float:
    """Returns the KL divergence of a whole plan from FLOAT on a text, nats per token.

    Args:
        weights: the checkpoint's weights.
        program: a program in the float dialect.
        assignments: assignments of the weights that do not stay as they are.
        blocks: the text; each block is a text of its own.
    """
    tokens = [torch.tensor(block, dtype=torch.int64) for block in blocks]
    forks = _Forks(weights, program, tokens, lambda done, size: None)
    return forks.divergence_of(assignments)


def stored_divergences(
    weights: CheckpointWeights,
    program: Program,
    values: Mapping[str, Callable[[], Tensor]],
    blocks: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> dict[str, float]:
    """Returns the KL divergence from FLOAT that each matrix causes alone, nats per token.

    Args:
        weights: the checkpoint's weights.
        program: a program in the float dialect.
        values: by matrix, what returns the values that it has instead, ``float32[rows, columns]``.
        blocks: the text; each block is a text of its own.
        progress: called with the number of matrices done and the number of all of them.

    Raises:
        QuantizationError: FLOAT's logits are NaN or infinite on the text.
    """
    tokens = [torch.tensor(block, dtype=torch.int64) for block in blocks]
    return _Forks(weights, program, tokens, progress).run_with(values)


def _read(file: Path, candidates: Candidates) -> Sensitivity | None:
    record = read_record(file)
    if record is None:
        return None
    try:
        found = Sensitivity(**record)
        whole = found.version == SENSITIVITY_VERSION and all(
            isinstance(found.costs[name][a.format.name], int | float)
            for name, given in candidates.items()
            for a in given
        )
    except (TypeError, LookupError, AttributeError):
        return None
    return found if whole else None


class _Forks:
    """Runs FLOAT on a text, and again from a call on with some weights stored in other formats."""

    def __init__(
        self,
        weights: CheckpointWeights,
        program: Program,
        blocks: Sequence[Tensor],
        progress: Callable[[int, int], None],
    ) -> None:
        self._weights, self._program, self._progress = weights, program, progress
        self._blocks, self._head = blocks, program.output()
        self._kept: dict[str, Tensor] = {}
        self._keep = 4 * weights.spec.num_parameters <= _KEPT_WEIGHTS
        self._walk = self._walk_with(lambda name: None)
        logits = self._finish(self._walk, 0, self._begin())
        if not all(bool(each.isfinite().all()) for each in logits):
            raise QuantizationError(
                "FLOAT gives NaN or infinite logits on the calibration text, so the cost of "
                "formats cannot be measured: the checkpoint overflows float32 there, or is damaged"
            )
        self._wanted = [each.log_softmax(-1) for each in logits]

    def run(self, candidates: Candidates, method: Method) -> dict[str, dict[str, float]]:
        """Returns the costs by weight and format name."""
        done, size = 0, len(candidates)
        costs: dict[str, dict[str, float]] = {}
        values, layers = self._begin(), ExpertLayers(self._program)
        before: tuple[int, list[Values]] = 0, []
        for index, node in enumerate(self._walk.order):
            if layers.begins(node):
                before = index, [dict(known) for known in values]
            name = self._weight_of(node)
            if node.target in dialect.GATHERING:
                for matrices in layers.take():
                    costs |= costs_of(matrices, partial(self._fork_all, *before))
                before = 0, []
            if name is not None and name in candidates and name not in costs:
                given = candidates[name]
                if method == "estimated" and layers.holds(node):
                    layers.add(node, self._errors(index, values, name, given))
                elif method == "measured" or node.target is dialect.EMBEDDING:
                    costs[name] = {a.format.name: self._fork(index, values, name, a) for a in given}
                else:
                    costs[name] = self._estimate(index, values, name, given)
                done += 1
                self._progress(done, size)
            if node is not self._head:
                with block_pool() as pool:
                    self._walk.advance(node, values, pool)
        return costs

    def run_with(self, stored: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
        """Returns the divergence with each of these weights alone as given."""
        costs: dict[str, float] = {}
        values = self._begin()
        for index, node in enumerate(self._walk.order):
            name = self._weight_of(node)
            if name is not None and name in stored and name not in costs:
                costs[name] = self._fork_with(index, values, name, stored[name]())
                self._progress(len(costs), len(stored))
            if node is self._head:
                break
            with block_pool() as pool:
                self._walk.advance(node, values, pool)
        return costs

    def divergence_of(self, assignments: Mapping[str, Assignment]) -> float:
        """Returns the divergence with all of these weights stored as assigned."""
        walk = self._walk_with(self._stored_as(assignments))
        return self._divergence(self._finish(walk, 0, self._begin()))

    def _stored_as(self, assignments: Mapping[str, Assignment]) -> Callable[[str], Tensor | None]:
        def stored(name: str) -> Tensor | None:
            # Computed when it is read and then dropped: all of a plan's weights may not fit in
            # memory.
            if name not in assignments:
                return None
            return stored_values(self._weights.float_weight(name), assignments[name], name)

        return stored

    def _fork(
        self, index: int, values: Sequence[Values], name: str, assignment: Assignment
    ) -> float:
        stored = stored_values(self._float_weight(name), assignment, name)
        return self._fork_with(index, values, name, stored)

    def _fork_with(self, index: int, values: Sequence[Values], name: str, stored: Tensor) -> float:
        """Runs the rest of the program with a weight of other values."""
        walk = self._walk_with({name: stored}.get)
        return self._divergence(self._finish(walk, index, [dict(known) for known in values]))

    def _estimate(
        self, index: int, values: Sequence[Values], name: str, given: Sequence[Assignment]
    ) -> dict[str, float]:
        """Measures the candidate of median error by a fork, and scales its cost for the others."""
        found = self._errors(index, values, name, given)
        errors, middle = found.errors, found.median()
        unit = self._fork(index, values, name, given[middle]) / (errors[middle] or 1.0)
        return {a.format.name: unit * error for a, error in zip(given, errors, strict=True)}

    def _errors(
        self, index: int, values: Sequence[Values], name: str, given: Sequence[Assignment]
    ) -> MatrixErrors:
        """Returns the squared error of a matrix's outputs with each candidate."""
        weight = self._float_weight(name)
        entering = node_argument(self._walk.order[index], 0)
        errors = []
        for assignment in given:
            change = stored_values(weight, assignment, name) - weight
            parts = (torch.nn.functional.linear(known[entering], change) for known in values)
            errors.append(sum(float(part.double().square().sum()) for part in parts))
        tokens = sum(known[entering].shape[1] for known in values)
        return MatrixErrors(name, given, errors, tokens)

    def _fork_all(
        self, index: int, values: Sequence[Values], assignments: Mapping[str, Assignment]
    ) -> float:
        """Runs the rest of the program with some weights stored as assigned."""
        walk = self._walk_with(self._stored_as(assignments))
        return self._divergence(self._finish(walk, index, [dict(known) for known in values]))

    def _begin(self) -> list[Values]:
        return [self._walk.begin(block) for block in self._blocks]

    def _walk_with(self, changed: Callable[[str], Tensor | None]) -> Walk:
        """Returns a walk that uses the weights ``changed`` returns instead of the checkpoint's."""

        def weight(given: Input) -> Tensor:
            found = changed(given.name)
            return self._float_weight(given.name) if found is None else found

        def rows(name: str, tokens: Tensor) -> Tensor:
            found = changed(name)
            if found is not None:
                return found[tokens]
            if self._keep:
                return self._float_weight(name)[tokens]
            return self._weights.float_rows(name, tokens)

        return Walk(self._program, weight, rows)

    def _finish(self, walk: Walk, index: int, values: Sequence[Values]) -> list[Tensor]:
        """Runs the program from call ``index`` on; returns logits by block."""
        with block_pool() as pool:
            for node in walk.order[index:]:
                if node is self._head:
                    break
                walk.advance(node, values, pool)
            return [logits[0] for logits in pool.map(walk.prepare(self._head), values)]

    def _divergence(self, found: Sequence[Tensor]) -> float:
        """Returns the mean of KL(FLOAT || found) over all positions, in nats.

        It is `UNUSABLE` where logits are NaN or infinite.
        """

        def total(pair: tuple[Tensor, Tensor]) -> float:
            wanted, logits = pair
            other = logits.log_softmax(-1)
            return float((wanted.exp() * (wanted - other)).sum(-1).double().sum())

        with block_pool() as pool:
            kl = sum(pool.map(total, zip(self._wanted, found, strict=True)))
        return max(0.0, kl / sum(map(len, found))) if math.isfinite(kl) else UNUSABLE

    def _weight_of(self, node: fx.Node) -> str | None:
        if node.target not in (dialect.LINEAR, dialect.EMBEDDING):
            return None
        return self._program.inputs[node_argument(node, 1).name].name

    def _float_weight(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        weight = self._weights.float_weight(name)
        if self._keep:
            self._kept[name] = weight
        return weight
