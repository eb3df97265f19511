"""The manifest of an artifact: what is known once its files are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.calibration.text import (
    Calibration,
)
from edgeforge.checkpoint.checkpoint import CheckpointDigest
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import Model
from edgeforge.planning.choose import Planned
from exporters.manifest import Manifest, WeightRecord
from exporters.target import ExportRequest, Lowered, ModelFacts, Target
from quant.store.store import WeightStore

if TYPE_CHECKING:
    pass


_TOOLS = ("edgeforge", "torch", "onnx", "onnxruntime")


def facts_of(spec: ModelSpec, context: int) -> ModelFacts:
    """What targets must know of a model, at a declared context."""
    return ModelFacts(
        model_type=spec.model_type,
        hidden_size=spec.hidden_size,
        head_dim=spec.head_dim,
        num_heads=tuple(layer.num_heads for layer in spec.layers),
        num_kv_heads=tuple(layer.num_kv_heads for layer in spec.layers),
        bos=spec.bos,
        eos=spec.eos,
        pad=spec.pad,
        context=context,
    )


def _copy_sidecars(checkpoint: Path, folder: Path) -> None:
    """Keeps what says how the model is configured and sampled."""
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _manifest(
    model: Model,
    digest: CheckpointDigest,
    planned: Planned,
    calibration: Calibration | None,
    store: WeightStore,
    target: Target,
    request: ExportRequest,
    lowered: Lowered,
    passed_over: Sequence[str],
) -> Manifest:
    from edgeforge.model.rope import uses_long_set

    checkpoint, spec, context = model.checkpoint, model.spec, request.facts.context
    plan, notes = planned.plan, [*lowered.notes, *planned.notes]
    if spec.rope.scaling == "longrope":
        chosen = "long" if uses_long_set(spec.rope, context) else "short"
        notes.append(
            f"longrope: the {chosen} factors apply at every position, as the declared context of "
            f"{context} tokens decides (the original context is {spec.rope.original_context})"
        )
    if calibration is not None:
        notes.extend(calibration.notes)
    notes.extend(passed_over)
    shapes = {name: weight.shape for name, weight in spec.weights.items()}
    return Manifest(
        target=target.name,
        entry=lowered.entry,
        recipe=plan.recipe,
        context=context,
        source={
            "model": checkpoint.source,
            "path": str(checkpoint.path.resolve()),
            "revision": checkpoint.revision,
            "sha256": digest.sha256,
            "files": {file.name: file.sha256 for file in digest.files},
        },
        model={**spec.summary(), "ignored_config": list(model.ignored_config)},
        bits_per_weight=plan.bits_per_weight(shapes, spec.num_parameters),
        weights={
            name: WeightRecord(
                shape=shapes[name],
                format=assignment.format.name,
                algorithm=assignment.algorithm,
                relative_error=store.relative_error[name],
                digest=store.digests[name],
                activation=assignment.activation,
            )
            for name, assignment in plan.weights.items()
        },
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
        notes=tuple(notes),
        options=request.options.given(),
        calibration={} if calibration is None else calibration.record(),
        rotation=planned.rotation,
        tools=versions(_TOOLS),
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by package name, of those that are installed.

    Exporting does not need onnxruntime, so it may be missing; where it is installed its version
    tells which runtime the artifact was written beside.
    """
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
