"""What an artifact is held against: its checkpoint, and the store of the same integers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.checkpoint.adapter import Adapter
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.model.model import DEMO, DEMO_FOLDER, Model, open_model
from edgeforge.stage_progress import Progress
from exporters.manifest import Manifest
from exporters.manifest_records import AdapterRecord
from quant.formats.activations import parse_activation
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan

if TYPE_CHECKING:
    from edgeforge.reference.walk import ReferenceRunner
    from quant.program.program import Program
    from quant.store.store import WeightStore


@dataclass(frozen=True)
class References:
    """What an artifact is held against.

    Attributes:
        original: FLOAT.
        quantized: QUANTIZED.
        store: the weight store that QUANTIZED reads.
        model: the model whose weights were quantized: the rotated one if one was.
        program: its program, in the float dialect.
    """

    original: ReferenceRunner
    quantized: ReferenceRunner
    store: WeightStore
    model: Model
    program: Program


def reopen(manifest: Manifest, checkpoint: str | None) -> Model:
    """Opens the checkpoint an artifact was made of, and makes sure that it is the same one.

    Raises:
        UsageError: it is another checkpoint.
        CheckpointError: it is not there, or the tokenizer that was named in place of its own.
    """
    source = manifest.source
    where, revision = checkpoint or source.path, None
    if source.model == str(DEMO_FOLDER) and checkpoint is None:
        where = DEMO
    elif checkpoint is None and not Path(where).exists() and source.revision:
        where, revision = source.model, source.revision
    adapters = manifest.merged_adapters
    model = open_model(
        where,
        revision=revision,
        tokenizer=_named_tokenizer(manifest),
        ignore_config=manifest.model.ignored_config,
        exit_layer=manifest.model.exit_layer,
        adapters=[find_adapter(record) for record in adapters],
    )
    for record, adapter in zip(adapters, model.adapters, strict=True):
        require_same(record, adapter)
    digest = model.checkpoint.digest()
    if digest.sha256 != source.sha256:
        raise UsageError(
            f"{where} is not the checkpoint that the artifact was made of (its digest differs): "
            f"name the right one with --checkpoint"
        )
    return model


def _named_tokenizer(manifest: Manifest) -> str | None:
    """Returns the tokenizer that was named in place of the checkpoint's own; None if none was.

    Raises:
        CheckpointError: it is not there any more.
    """
    given = "" if manifest.tokenizer is None else manifest.tokenizer.given
    if Path(given).is_absolute() and not Path(given).exists():
        raise CheckpointError(
            f"the tokenizer that the artifact was made with is not at {given} any more: put it "
            f"back there"
        )
    return given or None


def find_adapter(record: AdapterRecord) -> str:
    """Returns the adapter of a record as `open_model` takes it.

    Raises:
        CheckpointError: its folder is not there.
    """
    if not Path(record.path).is_dir():
        raise CheckpointError(
            f"the adapter {record.name} that the artifact was made with is not at {record.path} "
            f"any more: put its folder back there"
        )
    return f"{record.path}@{record.weight!r}"


def require_same(record: AdapterRecord, adapter: Adapter) -> None:
    """Refuses an adapter that is not the one of a record.

    Raises:
        UsageError: its digest differs.
    """
    if adapter.sha256 != record.sha256:
        raise UsageError(
            f"{record.path} is not the adapter that the artifact was made with (its digest "
            f"differs): put that one back there, or export again"
        )


def references(manifest: Manifest, model: Model, progress: Progress) -> References:
    """FLOAT from the checkpoint, QUANTIZED from the store, found in the cache or made now."""
    from edgeforge.calibration.text import Calibration, CalibrationRun
    from edgeforge.model.rotated_weights import recorded_rotation
    from edgeforge.model.trace import trace
    from edgeforge.reference.walk import ReferenceRunner, store_reader
    from edgeforge.weight_store import quantize
    from quant.program.rewrite import quantize_program

    plan = QuantPlan(
        manifest.recipe,
        {
            name: Assignment(
                parse_format(record.format), record.algorithm, parse_activation(record.activation)
            )
            for name, record in manifest.weights.items()
        },
        "" if manifest.rotation is None else manifest.rotation.name,
    )
    original = program = trace(model.spec, manifest.context)
    stored = model
    if manifest.rotation is not None:
        rotated = recorded_rotation(model, manifest.rotation, manifest.context)
        stored, program = rotated.model, rotated.program
    run = None
    if manifest.calibration is not None:
        calibration = Calibration.recorded(manifest.calibration)
        run = CalibrationRun(stored, calibration, lambda: program)
    store = quantize(stored.weights, model.checkpoint.digest(), plan, None, progress, run)
    reference = ReferenceRunner(
        original,
        lambda given: model.weights.float_weight(given.name),
        model.weights.float_rows,
    )
    return References(
        original=reference,
        quantized=ReferenceRunner(quantize_program(program, plan), store_reader(store)),
        store=store,
        model=stored,
        program=program,
    )
