"""Verifies an artifact of a module and holds what was found against a policy and a baseline."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edgeforge.errors import CheckFailed
from edgeforge.gate.judge import DEFAULT, held
from edgeforge.gate.metrics import BITS, GROWTH, MODULE, MODULE_FIGURES, SIZE
from edgeforge.gate.module_baseline import ModuleEntry
from edgeforge.gate.policy import Range, Terms
from edgeforge.gate.reports import Figure
from edgeforge.gate.result import Finding
from edgeforge.gate.subjects import ModuleChecking
from edgeforge.modules.samples import Sample, read_samples
from edgeforge.modules.verify import ModuleEvaluation, OutputDifference, evaluate
from exporters.manifest import check_files
from exporters.modules.manifest import SAMPLES

_SIZES = (SIZE, GROWTH, BITS)
_LOWERING = f"{MODULE}lowering"


@dataclass(frozen=True)
class ModuleFound:
    """What the verification of an artifact of a module found.

    Attributes:
        evaluation: all of it; None where the artifact is not what it should be.
        entry: what a baseline holds of it; None where it was not run.
        broken: what is wrong with it, if there is something.
    """

    evaluation: ModuleEvaluation | None
    entry: ModuleEntry | None = None
    broken: tuple[Finding, ...] = ()

    @property
    def measured_on(self) -> str:
        """On what it was run; empty where it was not."""
        return "" if self.entry is None else f"{_count(self.evaluation)} samples"


def verify_module(checking: ModuleChecking, threads: int | None) -> ModuleFound:
    """Verifies an artifact of a module.

    Raises:
        DeviceError: its runtime is missing or fails.
        ExportError: the artifact cannot be read.
    """
    changed = check_files(checking.folder, checking.manifest)
    if changed:
        return ModuleFound(None, broken=tuple(_fact("files", words) for words in changed))
    try:
        found = evaluate(checking.folder, threads)
    except CheckFailed as error:
        return ModuleFound(None, broken=(_fact("stored_weights", str(error)),))
    if found.not_run:
        return ModuleFound(found)
    manifest = checking.manifest
    entry = ModuleEntry(
        target=manifest.target,
        recipe=manifest.recipe,
        source=manifest.source_sha256,
        inputs=_digest_of_inputs(read_samples(checking.folder / SAMPLES)),
        artifact_bytes=sum(record.size for record in manifest.files.values()),
        figures={name: value for name, (value, _) in _figures(found).items()},
    )
    return ModuleFound(found, entry)


def judge_module(
    checking: ModuleChecking, found: ModuleFound, growth: float | None
) -> list[Finding]:
    """Holds an artifact of a module against a policy.

    Args:
        checking: the artifact, with its terms.
        found: what its verification found; it is not broken.
        growth: its size as a factor of the baseline's; None without a baseline.
    """
    assert found.evaluation is not None
    manifest, bounds = checking.manifest, checking.terms.bounds
    known = _figures(found.evaluation)
    figures = {name: Figure(value) for name, (value, _) in known.items()}
    size = float(sum(record.size for record in manifest.files.values()))
    figures |= {SIZE: Figure(size), BITS: Figure(manifest.bits_per_weight)}
    if growth is not None:
        figures[GROWTH] = Figure(growth)
    own = Range(at_most=found.evaluation.tolerance, source=DEFAULT)
    given = dict(bounds)
    if _LOWERING in figures:
        given = {_LOWERING: own, **bounds}
    return [
        finding
        for name, each in given.items()
        if name in (*MODULE_FIGURES, *_SIZES)
        for finding in held(name, each, figures.get(name), None, known.get(name, (0.0, ()))[1])
    ]


def notes_of(checking: ModuleChecking, found: ModuleFound) -> Iterator[str]:
    """What a user must know beside the findings, one sentence each."""
    unused = _not_for_modules(checking.terms)
    if unused:
        yield (
            f"{checking.path} is of a module, for which {', '.join(unused)} of the policy "
            f"{'is' if len(unused) == 1 else 'are'} not"
        )
    if found.evaluation is not None and found.evaluation.not_run:
        yield f"{checking.path} was {found.evaluation.not_run}"


def _not_for_modules(terms: Terms) -> list[str]:
    given = [name for name in ("text", "tokens", "checkpoint") if getattr(terms, name) is not None]
    named = (*terms.bounds, *terms.ratios, *terms.worse_by)
    return [*given, *(each for each in named if each not in (*MODULE_FIGURES, *_SIZES))]


def _figures(found: ModuleEvaluation) -> dict[str, tuple[float, tuple[str, ...]]]:
    """The worst output's figures by dotted name, and which output that is."""
    figures: dict[str, tuple[float, tuple[str, ...]]] = {}
    for name, sense in MODULE_FIGURES.items():
        field = name.removeprefix(MODULE)
        values = [(_worse(each, field), each.name) for each in found.outputs]
        known = [(value, output) for value, output in values if value is not None]
        if known:
            sign = 1 if sense == "at most" else -1
            value, output = max(known, key=lambda each: _order(sign * each[0]))
            figures[name] = value, (f"output {output}",)
    return figures


def _worse(output: OutputDifference, field: str) -> float | None:
    value: float | None = getattr(output, field)
    return value


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _digest_of_inputs(samples: Sequence[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        for name, array in sample.inputs.items():
            found.update(f"{name} {array.dtype} {array.shape}\n".encode())
            found.update(array.tobytes())
    return found.hexdigest()


def _count(evaluation: ModuleEvaluation | None) -> int:
    return 0 if evaluation is None else evaluation.samples


def _fact(name: str, message: str) -> Finding:
    return Finding(metric=name, outcome="failed", kind="fact", message=message)


def with_baseline(findings: Sequence[Finding], compared: Sequence[Finding]) -> list[Finding]:
    """Findings with the baseline's figures beside them, and then the comparisons themselves."""
    before = {each.metric: each.baseline for each in compared}
    return [*(replace(e, baseline=before.get(e.metric)) for e in findings), *compared]
