"""The gate: verifies what has no fresh report, and holds everything against policy and baseline."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.errors import CheckFailed, UsageError
from edgeforge.gate.judge import judge
from edgeforge.gate.latency import held_ratios
from edgeforge.gate.metrics import RATIOS
from edgeforge.gate.on_devices import held_bench, held_on_devices, needs_bench, read_own_bench
from edgeforge.gate.policy import POLICY, Policy
from edgeforge.gate.policy_file import read_policy
from edgeforge.gate.reports import read_report
from edgeforge.gate.result import ArtifactResult, Finding, GateResult
from edgeforge.gate.subjects import (
    Checking,
    ModuleChecking,
    find_subjects,
    look,
    model_names,
    not_for_models,
)
from edgeforge.stage_progress import Progress, no_progress
from quant.suggestion import did_you_mean

if TYPE_CHECKING:
    from edgeforge.gate.baseline import Baseline
    from edgeforge.gate.module_baseline import ModuleEntry


ANEW: Final = "reports of modules are made anew at every check"


@dataclass(frozen=True)
class GateOptions:
    """What a user asks of the gate.

    Attributes:
        policy: the policy's file; None for `POLICY` in the current folder, if it is there, else
            for the targets' own bounds.
        baseline: the baseline's file; None for the one that the policy names.
        update_baseline: whether to write the baseline anew.
        checkpoint: where the checkpoint is now; None for where the policy or the manifests say.
        threads: for the runtimes; None for their defaults.
        timed: whether to hold speeds against their references.
    """

    policy: Path | None = None
    baseline: Path | None = None
    update_baseline: bool = False
    checkpoint: str | None = None
    threads: int | None = None
    timed: bool = True


def check(
    folders: Sequence[Path], options: GateOptions, progress: Progress = no_progress
) -> GateResult:
    """Holds artifacts against a policy and a baseline.

    Args:
        folders: artifacts, or folders that hold some; none for those that the policy lists.
        options: what the user asked for.
        progress: told of each stage.

    Raises:
        UsageError: the policy or the baseline cannot be used, or there is nothing to check.
        EdgeForgeError: or an ExportError or DeviceError: an artifact could not be verified.
    """
    started = time.monotonic()
    policy = _policy(options.policy)
    subjects = find_subjects(policy, folders)
    checking = [each for each in subjects if isinstance(each, Checking)]
    baselines = _Baselines(policy, options)
    progress("files", 0, 0)
    look(checking, options.checkpoint)
    fresh = {each.path for each in checking if each.report is not None}
    broken = _verify_stale(checking, options, progress)
    results = []
    for each in subjects:
        if isinstance(each, ModuleChecking):
            progress(f"verify {each.path}: {ANEW}", 0, 0)
            results.append(_module_result(each, baselines, options))
            continue
        findings = broken.get(each.path) or _findings(each, baselines, options, progress)
        results.append(_result(each, each.path in fresh, findings))
        baselines.notes += [
            f"{each.path} is of a language model, for which {name} of the policy is not"
            for name in not_for_models(each.terms)
        ]
    if not folders:
        baselines.note_absent({each.path for each in subjects})
    result = GateResult(
        policy=None if policy.path is None else str(policy.path),
        baseline=None if baselines.path is None else str(baselines.path),
        baseline_updated=False,
        artifacts=tuple(results),
        notes=(*baselines.notes, *_unused_allowances(checking)),
        seconds=0.0,
    )
    if options.update_baseline and result.passed:
        baselines.update(checking, is_whole=not folders)
        result = replace(result, baseline_updated=True)
    return replace(result, seconds=round(time.monotonic() - started, 3))


def _policy(path: Path | None) -> Policy:
    usual = Path(POLICY)
    if path is None and not usual.is_file():
        return Policy(folder=Path())
    return read_policy(usual if path is None else path)


def _verify_stale(
    checking: Sequence[Checking], options: GateOptions, progress: Progress
) -> dict[str, tuple[Finding, ...]]:
    """Runs what has no fresh report; those of one export share their references.

    Returns:
        What is wrong with those that cannot be run, by path.
    """
    broken: dict[str, tuple[Finding, ...]] = {}
    groups: dict[object, list[Checking]] = {}
    for each in checking:
        if each.changed:
            broken[each.path] = tuple(_fact("files", words) for words in each.changed)
        elif each.report is None:
            progress(f"verify {each.path}: {'; '.join(each.stale)}", 0, 0)
            terms = each.terms
            groups.setdefault((terms.text, terms.tokens, terms.checkpoint), []).append(each)
    for group in groups.values():
        try:
            _verify(group, options, progress)
        except CheckFailed:
            # One of them is not what it should be; the others still run.
            for each in group:
                failed = _verify_apart(each, options, progress)
                if failed is not None:
                    broken[each.path] = (failed,)
    return broken


def _verify_apart(checking: Checking, options: GateOptions, progress: Progress) -> Finding | None:
    """Runs an artifact by itself, and says why it cannot be run where it cannot."""
    from edgeforge.verification.stored_weights import require_recorded_weights

    name = "stored_weights"
    try:
        require_recorded_weights(checking.folder, checking.manifest)
        name = "run"
        _verify([checking], options, progress)
    except CheckFailed as error:
        return _fact(name, str(error))
    return None


def _verify(group: Sequence[Checking], options: GateOptions, progress: Progress) -> None:
    from edgeforge.verification.verify import verify_together
    from edgeforge.verification.verify_options import VerifyOptions

    terms = group[0].terms
    asked = VerifyOptions(
        text=terms.text,
        tokens=terms.tokens,
        checkpoint=terms.checkpoint or options.checkpoint,
        threads=options.threads,
        timed=False,
    )
    verify_together([each.folder for each in group], asked, progress)
    for each in group:
        each.report = read_report(each.folder)


def _findings(
    checking: Checking, baselines: _Baselines, options: GateOptions, progress: Progress
) -> tuple[Finding, ...]:
    assert checking.report is not None, "what could not be verified does not come here"
    growth, compared = baselines.compare(checking)
    before = {each.metric: each.baseline for each in compared}
    found = [
        replace(each, baseline=before.get(each.metric))
        for each in judge(checking.report, checking.terms, growth)
    ]
    found += compared
    found += held_on_devices(checking.report, checking.terms)
    if options.timed:
        here = {
            name: checking.terms.ratios[name] for name in RATIOS if name in checking.terms.ratios
        }
        found += held_ratios(checking.folder, here, options.threads, {}, progress)
        if needs_bench(checking.terms):
            bench = read_own_bench(checking.folder)
            found += held_bench(checking.folder, bench, checking.terms)
    return tuple(found)


def _unused_allowances(checking: Sequence[Checking]) -> list[str]:
    """A sentence for each name that a policy allows and no check has: it may be misspelt."""
    reports = [each.report for each in checking if each.report is not None]
    known = sorted({check.name for report in reports for check in report.checks})
    named = dict.fromkeys(name for each in checking for name in each.terms.allow)
    return [
        f"the policy allows {name}, which no check here has{did_you_mean(name, known)}"
        for name in named
        if name not in known
    ]


def _result(checking: Checking, fresh: bool, findings: tuple[Finding, ...]) -> ArtifactResult:
    report = checking.report
    return ArtifactResult(
        path=checking.path,
        folder=str(checking.folder),
        target=checking.manifest.target,
        recipe=checking.manifest.recipe,
        model=model_names(checking.manifest)[0],
        fresh=fresh,
        verified_because=tuple(checking.stale),
        measured_on="" if report is None else f"{report.tokens:,} tokens of {report.text}",
        findings=findings,
    )


def _module_result(
    checking: ModuleChecking, baselines: _Baselines, options: GateOptions
) -> ArtifactResult:
    from edgeforge.gate.modules import judge_module, notes_of, verify_module, with_baseline

    found = verify_module(checking, options.threads)
    baselines.notes += notes_of(checking, found)
    findings = found.broken
    if not findings:
        growth, compared = baselines.compare_module(checking, found.entry)
        findings = tuple(with_baseline(judge_module(checking, found, growth), compared))
    return ArtifactResult(
        path=checking.path,
        folder=str(checking.folder),
        target=checking.manifest.target,
        recipe=checking.manifest.recipe,
        model=checking.model,
        fresh=False,
        verified_because=(ANEW,),
        measured_on=found.measured_on,
        findings=findings,
    )


def _fact(name: str, message: str) -> Finding:
    return Finding(metric=name, outcome="failed", kind="fact", message=message)


class _Baselines:
    """The baseline, where there is one; reading it takes NumPy, which a check may not need.

    Args:
        policy: which may name it.
        options: which may, too.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, policy: Policy, options: GateOptions) -> None:
        self.path = options.baseline or policy.baseline
        self.notes: list[str] = []
        self._modules: dict[str, ModuleEntry | None] = {}
        self._updating = options.update_baseline
        if self.path is None and self._updating:
            self.path = policy.folder / "baseline.json"
        self._baseline: Baseline | None = None
        if self.path is None:
            return
        from edgeforge.gate.baseline import read_baseline

        if self.path.exists() or not self._updating:
            self._baseline = read_baseline(self.path)

    def compare(self, checking: Checking) -> tuple[float | None, list[Finding]]:
        """The growth of an artifact's size, and how its figures changed."""
        if self._updating:
            return 1.0, []  # what is written now is its own baseline
        if self._baseline is None:
            return None, []
        from edgeforge.gate.baseline import compare, entry_of, require_comparable

        assert self.path is not None and checking.report is not None
        before = self._baseline.entries.get(checking.path)
        if before is None:
            self._note_new(checking.path)
            return None, []
        manifest = checking.manifest
        now = entry_of(checking.report, manifest.target, manifest.recipe, checking.tokenizer)
        require_comparable(self.path, checking.path, before, now)
        assert now is not None
        growth = now.artifact_bytes / max(1, before.artifact_bytes)
        return growth, compare(before, now, checking.terms.worse_by)

    def compare_module(
        self, checking: ModuleChecking, entry: ModuleEntry | None
    ) -> tuple[float | None, list[Finding]]:
        """The growth of a module's size, and how its figures changed.

        Args:
            checking: the artifact.
            entry: what a baseline holds of it; None where it was not run here.
        """
        self._modules[checking.path] = entry
        if self._updating:
            return 1.0, []
        if self._baseline is None or entry is None:
            return None, []
        from edgeforge.gate.module_baseline import compare, require_comparable

        assert self.path is not None
        before = self._baseline.modules.get(checking.path)
        if before is None:
            self._note_new(checking.path)
            return None, []
        require_comparable(self.path, checking.path, before, entry)
        growth = entry.artifact_bytes / max(1, before.artifact_bytes)
        return growth, compare(before, entry, checking.terms.worse_by)

    def _note_new(self, name: str) -> None:
        self.notes.append(
            f"{name} is not in the baseline {self.path}, so nothing tells whether it got worse: "
            f"--update-baseline adds it"
        )

    def note_absent(self, paths: Collection[str]) -> None:
        """Notes what the baseline has and the policy does not list: it may have got lost."""
        if self._baseline is None or self._updating:
            return
        known = self._baseline.entries.keys() | self._baseline.modules.keys()
        for name in sorted(known - set(paths)):
            self.notes.append(
                f"the baseline {self.path} has {name}, which was not checked: export it, or leave "
                f"it out with --update-baseline"
            )

    def update(self, checking: Sequence[Checking], *, is_whole: bool) -> None:
        """Writes the baseline anew.

        Args:
            checking: what was checked.
            is_whole: whether that is all; else what was not checked stays as it was.

        Raises:
            UsageError: one was measured on too few tokens.
        """
        from edgeforge.gate.baseline import Baseline, entry_of

        assert self.path is not None
        kept = Baseline() if self._baseline is None or is_whole else self._baseline
        entries, modules = dict(kept.entries), dict(kept.modules)
        for each in checking:
            assert each.report is not None
            manifest = each.manifest
            entry = entry_of(each.report, manifest.target, manifest.recipe, each.tokenizer)
            if entry is None:
                raise UsageError(
                    f"{each.path} was measured on {each.report.tokens} tokens, which is too few "
                    f"for a baseline: raise tokens until there are at least four blocks of 512"
                )
            entries[each.path] = entry
        for name, found in self._modules.items():
            if found is None:
                raise UsageError(
                    f"{name} was not run here, so that a baseline has no figures of it: leave it "
                    f"out of the policy, or check on a machine that runs it"
                )
            modules[name] = found
        Baseline(entries, modules).write(self.path)
