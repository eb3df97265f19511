"""`diagnose`: FLOAT, QUANTIZED and ARTIFACT point by point, what each weight costs, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from device_harness.device_session import open_on
from device_harness.devices.host import HostDevice
from device_harness.errors import DeviceError
from device_harness.session import Session
from edgeforge.diagnosis.noise import PointNoise, decibels, leaves, noise_at_points
from edgeforge.diagnosis.outliers import Outlier, OutlierMeter
from edgeforge.diagnosis.points import ArtifactPoints, Point, arranged, artifact_points
from edgeforge.diagnosis.weights import Upgrade, WeightCost, weight_costs
from edgeforge.model.model import Model
from edgeforge.reference.choices import Following
from edgeforge.reference.walk import ReferenceRunner, Walk, store_reader
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.verification.chosen_experts import RouterReader, artifact_routers
from edgeforge.verification.references import references, reopen
from edgeforge.verification.rounding import rounds_activations
from edgeforge.verification.sample import TokenCount, choose_sample
from exporters.manifest import Manifest

DIAGNOSIS_VERSION: Final = 1
DEFAULT_TOKENS: Final = 512


@dataclass(frozen=True)
class DiagnoseOptions:
    """What a user asks of a diagnosis.

    Attributes:
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it.
        checkpoint: where the checkpoint is now; None for where the manifest says.
        threads: for the runtime; None for its default here.
        weights: whether to measure what each weight costs, which takes longest.
    """

    text: Path | None = None
    tokens: TokenCount = DEFAULT_TOKENS
    checkpoint: str | None = None
    threads: int | None = None
    weights: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """Where an artifact loses accuracy.

    Attributes:
        target: the runtime's format.
        recipe: how it was quantized.
        runtime: what ran it.
        text: the text.
        tokens: tokens of it.
        noise: the points, in the order in which they are computed.
        leaves: the first point at which the artifact leaves QUANTIZED all at once; None for none.
        weights: what each matrix costs alone, the dearest first; empty where it was not measured.
        upgrades: what more bits for single matrices would save, the most first.
        outliers: the channels with activations far beyond the others'.
        rounds_activations: whether the runtime's kernels round activations that QUANTIZED does not.
        unshown: what could not be measured, one sentence each.
        mixture: whether tokens choose experts.
        followed: whether QUANTIZED has the experts that the artifact's tokens chose.
        schema_version: of the record.
    """

    target: str
    recipe: str
    runtime: str
    text: str
    tokens: int
    noise: tuple[PointNoise, ...]
    leaves: Point | None
    weights: tuple[WeightCost, ...] = ()
    upgrades: tuple[Upgrade, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    rounds_activations: bool = False
    unshown: tuple[str, ...] = field(default=())
    mixture: bool = False
    followed: bool = False
    schema_version: int = DIAGNOSIS_VERSION

    def to_json(self) -> dict[str, object]:
        """The record for ``--json``; signal-to-noise ratios are in dB."""
        rows = [
            {
                "layer": each.point.layer,
                "part": each.point.part,
                "quantization_db": _finite(decibels(each.quantization)),
                "lowering_db": _finite(decibels(each.lowering)),
            }
            for each in self.noise
        ]
        own = asdict(self)
        if not self.mixture:
            del own["followed"]
        return {**own, "noise": rows, "advice": advice(self)}


def diagnose(folder: Path, options: DiagnoseOptions, progress: Progress = no_progress) -> Diagnosis:
    """Finds where an artifact loses accuracy.

    Args:
        folder: the artifact.
        options: what the user asked for.
        progress: told of each stage.

    Raises:
        EdgeForgeError: or an ExportError or DeviceError: it could not be read or run.
    """
    manifest = Manifest.read(folder)
    model = reopen(manifest, options.checkpoint)
    context = manifest.context
    sample = choose_sample(
        folder, model.spec, context, options.text, options.tokens, manifest.calibration
    )
    blocks = [torch.tensor(block, dtype=torch.int64) for block in sample.blocks]
    made = references(manifest, model, progress)
    original = made.model.weights.float_walk(made.program)
    quantized = Walk(made.quantized.program, store_reader(made.store))
    points = artifact_points(folder, manifest)
    unshown = [points.why_none] if points.why_none else []
    with open_on(HostDevice(), folder, manifest, options.threads) as session:
        runtime = session.runtime
        progress("run the artifact", 0, 0)
        values, missing = _artifact_values(session, points, blocks, model)
        following, unread = _following(session, folder, manifest, made.quantized, blocks)
    unshown += [*missing, *unread]
    progress("compare", 0, 0)
    outliers = OutlierMeter(original)
    noise = noise_at_points(original, quantized, blocks, values, outliers.look, following)
    del values
    found = leaves(noise)
    costs: list[WeightCost] = []
    upgrades: list[Upgrade] = []
    if options.weights:
        costs, upgrades = weight_costs(
            manifest,
            made.model,
            made.program,
            made.store,
            sample.blocks,
            lambda done, size: progress("weights", done, size),
        )
        if not costs:
            unshown.append(
                "what each weight costs: the recipe rescales columns, so weights cannot be "
                "exchanged one by one"
            )
    model.checkpoint.require_unchanged()
    return Diagnosis(
        target=manifest.target,
        recipe=manifest.recipe,
        runtime=runtime,
        text=sample.text,
        tokens=sample.tokens,
        noise=tuple(noise),
        leaves=None if found is None else found.point,
        weights=tuple(costs),
        upgrades=tuple(upgrades),
        outliers=tuple(outliers.result()),
        rounds_activations=rounds_activations(manifest),
        unshown=tuple(unshown),
        mixture=model.spec.mixture,
        followed=following is not None,
    )


def advice(diagnosis: Diagnosis) -> list[str]:
    """What to do, one sentence each, the most useful first."""
    found = []
    if diagnosis.leaves is not None:
        found.append(
            f"the artifact leaves QUANTIZED at {diagnosis.leaves}: its files or its runtime "
            f"compute something else there, which no format mends; `edgeforge verify` says what "
            f"the files hold otherwise"
        )
        if diagnosis.mixture and not diagnosis.followed:
            found.append(
                "or tokens choose other experts there: where a router's logits lie close together, "
                "the last bit of an activation decides, and all of a token's sum changes"
            )
        if diagnosis.rounds_activations:
            found.append(
                "the runtime rounds activations to 8 bits: where a channel far beyond the others "
                "enters that layer, export with --activations float"
            )
    for each in diagnosis.upgrades:
        if each.saves >= 0.02:
            found.append(
                f"{each.name} to {each.format} costs {each.costs / 1e6:.2g} MB and removes "
                f"{100 * each.saves:.0f} % of the quantization error"
            )
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _following(
    session: Session,
    folder: Path,
    manifest: Manifest,
    quantized: ReferenceRunner,
    blocks: Sequence[Tensor],
) -> tuple[list[Following] | None, list[str]]:
    """What makes QUANTIZED follow the artifact's choices of experts, and why nothing does."""
    routers = quantized.routers
    if not routers:
        return None, []
    reader = RouterReader(session, artifact_routers(folder, manifest), routers)
    chosen = reader.choices([block.numpy() for block in blocks])
    if chosen is None:
        return None, [f"which experts tokens choose: {reader.why_none}"]
    return [Following(choices) for choices in chosen], []


def _artifact_values(
    session: Session, points: ArtifactPoints, blocks: Sequence[Tensor], model: Model
) -> tuple[dict[Point, Tensor], list[str]]:
    """The artifact's value of each point over all texts, and what it does not show."""
    if not points.names:
        return {}, []
    parts: dict[Point, list[Tensor]] = {}
    unknown: set[Point] = set()
    try:
        texts = session.values([block.numpy() for block in blocks], list(points.names.values()))
    except DeviceError as error:
        return {}, [str(error)]
    for block, shown in zip(blocks, texts, strict=True):
        for point, name in points.names.items():
            heads = points.heads[point.layer]
            is_attention = point.part == "attention" and heads[0] > 0
            width = heads[0] * heads[2] if is_attention else model.spec.hidden_size
            rows = arranged(shown[name], width, heads) if name in shown else None
            if rows is None or len(rows) != len(block):
                unknown.add(point)
            else:
                parts.setdefault(point, []).append(rows)
    found = {point: torch.cat(rows) for point, rows in parts.items() if point not in unknown}
    hidden = sorted(unknown)
    words = f"{', '.join(map(str, hidden[:3]))}{', ...' if hidden[3:] else ''}"
    return found, [f"the runtime does not show the value of {words}"] if hidden else []
