"""Finds the artifacts to check, and what of their reports still holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from edgeforge.checkpoint.adapter import adapter_digest
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import EdgeForgeError, UsageError
from edgeforge.gate.metrics import MODULE
from edgeforge.gate.policy import Policy, Subject, Terms
from edgeforge.gate.reports import Report, StaleReportError, read_report
from edgeforge.model.model import DEMO, DEMO_FOLDER
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.freshness import freshness_of
from exporters.manifest import MANIFEST, MODULE_MANIFEST, Manifest, check_files
from exporters.manifest_records import AdapterRecord
from exporters.modules.manifest import ModuleManifest, is_module
from quant.processors import default_threads


@dataclass
class Checking:
    """One artifact on its way through the gate.

    Attributes:
        folder: as the user named it.
        path: relative to the policy's folder: what rules and baselines call it.
        manifest: the artifact's.
        terms: of the policy, for this artifact.
        changed: what is not as the manifest records, a phrase each.
        stale: why its report does not hold, a phrase each.
        report: its report, once there is one that holds.
    """

    folder: Path
    path: str
    manifest: Manifest
    terms: Terms
    changed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    report: Report | None = None

    @property
    def tokenizer(self) -> str:
        """Digest of the tokenizer's file; empty without one."""
        return self.manifest.tokenizer_sha256


@dataclass(frozen=True)
class ModuleChecking:
    """One artifact of a module on its way through the gate.

    Attributes:
        folder: as the user named it.
        path: relative to the policy's folder: what rules and baselines call it.
        manifest: the artifact's.
        terms: of the policy, for this artifact.
    """

    folder: Path
    path: str
    manifest: ModuleManifest
    terms: Terms

    @property
    def model(self) -> str:
        """What to call the module."""
        return self.manifest.source or self.manifest.module


def find_subjects(policy: Policy, asked: Sequence[Path]) -> list[Checking | ModuleChecking]:
    """The artifacts to check, with what each must keep to.

    Args:
        policy: which says them where the user names none.
        asked: what the user named: artifacts, or folders that hold some.

    Raises:
        UsageError: there is none, or a pattern or a rule of the policy is for none.
        ExportError: a folder is no artifact.
    """
    folders = _unique(find_artifacts(asked) if asked else _of_policy(policy))
    if not folders:
        raise UsageError(
            "there is nothing to check: name artifacts, or list them under 'artifacts' in the "
            "policy"
        )
    found: list[Checking | ModuleChecking] = []
    used: set[int] = set()
    root = os.path.realpath(policy.folder)
    for folder in folders:
        path = Path(os.path.relpath(os.path.realpath(folder), root)).as_posix()
        if is_module(folder):
            module = ModuleManifest.read(folder)
            names = tuple(name for name in (module.source, module.module) if name)
            subject = Subject(path, module.target, module.recipe, names)
            found.append(ModuleChecking(folder, path, module, policy.terms_for(subject)))
        else:
            manifest = Manifest.read(folder)
            subject = Subject(path, manifest.target, manifest.recipe, model_names(manifest))
            found.append(Checking(folder, path, manifest, policy.terms_for(subject)))
        used |= {rule.number for rule in policy.rules if rule.chooses(subject)}
    if not asked:
        for rule in policy.rules:
            if rule.number not in used:
                raise UsageError(
                    f"{policy.path}: {rule} is for none of the {len(found)} artifacts "
                    f"({', '.join(each.path for each in found[:4])}): mend its match, or remove it"
                )
    return found


def model_names(manifest: Manifest) -> tuple[str, ...]:
    """What a rule may call an artifact's model."""
    if manifest.source.model == str(DEMO_FOLDER):
        return (DEMO,)
    places = (manifest.source.model, manifest.source.path)
    return tuple(dict.fromkeys((places[0], *(Path(each).name for each in places))))


def not_for_models(terms: Terms) -> list[str]:
    """What terms say of modules alone."""
    return [name for name in (*terms.bounds, *terms.worse_by) if name.startswith(MODULE)]


def look(checking: Sequence[Checking], checkpoint: str | None) -> None:
    """Tells of each artifact whether its files are as written, and whether its report holds.

    Every file is read and its digest compared: sizes and times prove nothing.

    Args:
        checking: the artifacts.
        checkpoint: where their checkpoint is now; None for where the manifests say.
    """
    with ThreadPoolExecutor(default_threads()) as pool:
        problems = pool.map(lambda each: check_files(each.folder, each.manifest), checking)
        for each, changed in zip(checking, problems, strict=True):
            each.changed = changed
    digests: dict[str, str | None] = {}
    for each in checking:
        if each.changed:
            continue
        where = each.terms.checkpoint or checkpoint or _checkpoint_place(each.manifest)
        if where not in digests:
            digests[where] = _checkpoint_digest(where)
        _look_at_report(each, digests[where])


def _look_at_report(checking: Checking, digest: str | None) -> None:
    try:
        report = read_report(checking.folder)
    except StaleReportError as error:
        checking.stale = [str(error)]
        return
    terms, made = checking.terms, report.freshness
    now = freshness_of(
        checking.folder,
        checking.manifest,
        text=terms.text,
        tokens=terms.tokens,
        bounds={},
        options={},
    )
    checking.stale = made.changes(now, report.tokens)
    if digest is not None and digest != made.checkpoint:
        checking.stale.append("the checkpoint changed")
    changed = filter(_is_changed, checking.manifest.adapters)
    checking.stale += [f"the adapter {record.name} changed" for record in changed]
    if not checking.stale:
        checking.report = report


def _is_changed(record: AdapterRecord) -> bool:
    """Whether an adapter is at hand and is no more the one that the artifact was made with."""
    if not Path(record.path).is_dir():
        return False
    try:
        return adapter_digest(Path(record.path)) != record.sha256
    except (EdgeForgeError, OSError):
        return True


def _checkpoint_place(manifest: Manifest) -> str:
    source = manifest.source
    return str(DEMO_FOLDER) if source.model == str(DEMO_FOLDER) else source.path


def _checkpoint_digest(where: str) -> str | None:
    """The digest of a checkpoint; None where it is not at hand, or cannot be read.

    A report that is fresh otherwise holds without it. What needs it says why it cannot be read.
    """
    if not Path(where).exists():
        return None
    try:
        return Checkpoint.open(where).digest().sha256
    except EdgeForgeError:
        return "unreadable"


def _of_policy(policy: Policy) -> list[Path]:
    found: list[Path] = []
    for pattern in policy.artifacts:
        inside = find_artifacts(_matching(policy.folder, pattern))
        if not inside:
            raise UsageError(
                f"{policy.path}: artifacts: {pattern} matches no artifact: export it first, or "
                f"mend the pattern"
            )
        found += inside
    return found


def _matching(root: Path, pattern: str) -> list[Path]:
    if set(pattern) & set("*?["):
        if Path(pattern).is_absolute():
            root, pattern = Path("/"), pattern.lstrip("/")
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
        manifests = (MANIFEST, MODULE_MANIFEST)
        return [path for path in found if any((path / name).is_file() for name in manifests)] or [
            path for path in found if any(any(path.glob(f"*/{name}")) for name in manifests)
        ]
    place = root / pattern
    return [place] if place.is_dir() else []


def _unique(folders: Sequence[Path]) -> list[Path]:
    seen: Mapping[str, Path] = {os.path.realpath(folder): folder for folder in reversed(folders)}
    return [folder for folder in folders if seen[os.path.realpath(folder)] is folder]
