"""What `edgeforge inspect` says of an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeforge.errors import CheckFailed
from edgeforge.verification.stored_weights import require_recorded_weights
from exporters.manifest import Manifest, check_files
from exporters.manifest_records import AdapterRecord
from exporters.registry import find_target
from exporters.structure import Section, to_json


@dataclass(frozen=True)
class InspectReport:
    """What an artifact holds, and whether its files are as they were written.

    Attributes:
        folder: the artifact.
        manifest: its manifest.
        sections: what its files consist of, as its target reads them; none where one was changed.
        problems: files that are missing or were changed, a phrase each.
    """

    folder: Path
    manifest: Manifest
    sections: tuple[Section, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """For ``--json``: the manifest, the structure as it is now and the problems."""
        return {
            **self.manifest.to_json(),
            "structure": to_json(self.sections),
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """What stands above the tables."""
        manifest, source, rotation = self.manifest, self.manifest.source, self.manifest.rotation
        lines = [
            f"{self.folder}: {manifest.target} from {source.model}, recipe {manifest.recipe}",
            f"context {manifest.context} tokens, {manifest.bits_per_weight:.3f} bits a weight, "
            f"checkpoint sha256 {source.sha256[:16]}",
            f"inputs: {_listed(manifest.inputs)}",
            f"outputs: {_listed(manifest.outputs)}",
        ]
        if rotation is not None:
            lines.append(f"rotation: {rotation.name}, seed {rotation.seed}")
        if manifest.model.exit_layer is not None:
            layer, layers = manifest.model.exit_layer, manifest.model.checkpoint_layers
            lines.append(f"cut after layer {layer} of {layers}")
        lines += [f"adapter: {told_of(record)}" for record in manifest.adapters]
        if manifest.draft_positions > 1:
            lines.append(f"drafts: the logits of {manifest.draft_positions} positions a call")
        lines.append(f"states: {_states(manifest)}")
        lines += [f"warning: {warning}" for warning in manifest.warnings]
        return [*lines, *(f"note: {note}" for note in manifest.notes)]

    def require_whole(self) -> None:
        """Refuses an artifact whose files or stored weights are not as they were written.

        Raises:
            CheckFailed: says which are not.
        """
        if self.problems:
            raise CheckFailed(f"{self.folder}: {'; '.join(self.problems)}")
        require_recorded_weights(self.folder, self.manifest)


def told_of(record: AdapterRecord) -> str:
    """Returns a line about an adapter."""
    times = "" if record.weight == 1 else f" times {record.weight:g}"
    how = f"beside the weights in {record.file}" if record.file else "merged into the weights"
    return f"{record.name}{times}, {how}, sha256 {record.sha256[:16]}"


def inspect_artifact(folder: Path) -> InspectReport:
    """Reads an artifact's manifest, compares its files with it and looks into them.

    Raises:
        ExportError: the folder is no artifact, or its files cannot be read.
    """
    manifest = Manifest.read(folder)
    problems = tuple(check_files(folder, manifest))
    sections = () if problems else find_target(manifest.target).structure(folder)
    return InspectReport(folder, manifest, sections, problems)


def _states(manifest: Manifest) -> str:
    """Returns how many states of each kind the model's layers have, by `quant.program.states`."""
    listed = manifest.model.summary.get("layers")
    layers = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    mixers = [row.get("mixer", "attention") for row in layers]
    shifted = sum(row.get("feed_forward") == "channel_mix" for row in layers)
    memories = sum(row.get("recurrence") is not None for row in layers)
    counts = {
        "caches": 2 * mixers.count("attention"),
        "of recent tokens": len(mixers) - mixers.count("attention") + shifted,
        "memories of recurrences": memories,
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _listed(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {shape}" for name, shape in named.items())
