"""Writes an artifact's manifest and copies the checkpoint's own configuration beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgeforge.calibration.few_tokens import few_tokens_note
from edgeforge.checkpoint.adapter import Adapter
from edgeforge.checkpoint.checkpoint import Checkpoint, CheckpointDigest
from edgeforge.export_options import ExportRun
from edgeforge.model.model import Model
from edgeforge.tokenizer import TOKENIZER, Tokenizer
from edgeforge.trace_and_quantize import TracedAndQuantized
from exporters.float_columns import FloatColumns
from exporters.manifest import Manifest, record_files
from exporters.manifest_records import (
    AdapterRecord,
    ModelRecord,
    SourceRecord,
    TokenizerRecord,
    WeightRecord,
)
from exporters.structure import to_json
from exporters.target import Lowered, Target
from quant.plans.plan import QuantPlan
from quant.processors import processor_kind
from quant.store.store import WeightStore

_TOOLS = ("edgeforge", "torch", "onnx", "onnxruntime")


def write_manifest(
    run: ExportRun,
    target: Target,
    made: TracedAndQuantized,
    lowered: Lowered,
    warnings: tuple[str, ...],
    folder: Path,
    beside: Sequence[AdapterRecord] = (),
) -> None:
    """Writes an artifact's manifest, which records all other files: they must be there already.

    Args:
        run: the export.
        target: the target that wrote the artifact.
        made: the checkpoint's digest and the weights.
        lowered: what the target wrote.
        warnings: what is not as a user expects, one sentence each.
        folder: the artifact's folder.
        beside: the adapters that lie beside the weights.
    """
    # Apps read the configuration and the sampling defaults from these.
    for name, path in run.model.checkpoint.sidecars.items():
        shutil.copyfile(path, folder / name)
    spec, plan = run.model.spec, run.planned.plan
    shapes = run.model.weights.shapes()
    rotated, calibration = run.planned.rotated, run.calibration
    Manifest(
        target=target.name,
        entry=lowered.entry,
        recipe=plan.recipe,
        context=run.facts.context,
        source=_source_record(run.model, made.digest),
        model=_model_record(run.model),
        bits_per_weight=plan.bits_per_weight(shapes, spec.num_parameters),
        weights=_weight_records(plan, made.store, shapes, lowered.float_columns),
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
        notes=(*_notes(run, lowered), *few_tokens_note(made.store.tokens, shapes)),
        warnings=warnings,
        options=run.options.target.only(target.options).given(),
        calibration=None if calibration is None else calibration.record(),
        rotation=None if rotated is None else rotated.record,
        tools=versions(_TOOLS),
        processor=processor_kind(),
        files=record_files(folder),
        structure=to_json(target.structure(folder)),
        tokenizer=_tokenizer_record(run.model.checkpoint, folder),
        adapters=(*map(adapter_record, run.model.adapters), *beside),
    ).write(folder)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns installed versions by package name; packages that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not every target needs every package
            continue
    return found


def _tokenizer_record(checkpoint: Checkpoint, folder: Path) -> TokenizerRecord | None:
    """Returns what the artifact's tokenizer adds; None where it has none.

    All targets copy the file, which was tried already: a copy would be tried again.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    prefix, suffix = Tokenizer(checkpoint.tokenizer_files[TOKENIZER], str(folder)).added()
    num_bos = 1 if prefix or suffix else 0
    return TokenizerRecord(prefix, suffix, num_bos, checkpoint.named_tokenizer)


def _source_record(model: Model, digest: CheckpointDigest) -> SourceRecord:
    return SourceRecord(
        model=model.checkpoint.source,
        path=str(model.checkpoint.place),
        revision=model.checkpoint.revision,
        sha256=digest.sha256,
        files={file.name: file.sha256 for file in digest.files},
    )


def adapter_record(adapter: Adapter, file: str = "") -> AdapterRecord:
    """Returns an adapter's record; ``file`` is the artifact's that holds it, if one does."""
    place = str(adapter.place)
    return AdapterRecord(adapter.name, place, adapter.sha256, adapter.weight, file)


def _model_record(model: Model) -> ModelRecord:
    ignored = list(model.ignored_config)
    row = {**model.spec.summary(), "eos": list(model.eos), "ignored_config": ignored}
    if model.exit_layer is not None:
        row |= {"exit_layer": model.exit_layer, "checkpoint_layers": model.checkpoint_layers}
    return ModelRecord.from_json(row)


def _weight_records(
    plan: QuantPlan,
    store: WeightStore,
    shapes: Mapping[str, tuple[int, ...]],
    float_columns: FloatColumns,
) -> dict[str, WeightRecord]:
    return {
        name: WeightRecord(
            shape=shapes[name],
            format=assignment.format.name,
            algorithm=assignment.algorithm,
            relative_error=store.relative_error[name],
            digest=store.digests[name],
            activation=assignment.activation,
            float_columns=float_columns.get(name, ()),
        )
        for name, assignment in plan.weights.items()
    }


def _notes(run: ExportRun, lowered: Lowered) -> tuple[str, ...]:
    """Returns what a user must know about an artifact, one sentence each."""
    from edgeforge.model.rope import uses_long_set

    rope, context = run.model.spec.rope, run.facts.context
    notes = [*run.model.checkpoint.notes, *lowered.notes, *run.planned.notes]
    if rope is not None and rope.scaling == "longrope" and not uses_long_set(rope, context):
        notes.append(
            f"longrope: the short factors apply at every position, as the declared context of "
            f"{context} tokens decides (the original context is {rope.original_context})"
        )
    layer, layers = run.model.exit_layer, run.model.checkpoint_layers
    if layer is not None:
        notes.append(
            f"the model is cut after layer {layer} of {layers}: the last norm and the head follow "
            f"it, and config.json beside it is the whole checkpoint's"
        )
    return tuple(notes)
