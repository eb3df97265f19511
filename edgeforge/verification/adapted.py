"""Runs an artifact with each of its adapters, and holds it against the checkpoint with the same.

FLOAT has the adapter merged into its float weights, QUANTIZED has the float adapter on the
quantized base, as the artifact has. So the figures say what quantizing the base does to the tuned
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from device_harness.registry import taken_options
from edgeforge.checkpoint.adapter import open_adapters
from edgeforge.checkpoint.imported.method import DecodableMethod
from edgeforge.model.low_rank import added, low_rank
from edgeforge.model.model import Model, open_model
from edgeforge.verification.bounds import Bound, Checked, decide
from edgeforge.verification.metrics import Divergence

if TYPE_CHECKING:
    from edgeforge.verification.references import References
    from exporters.manifest import Manifest
    from exporters.manifest_records import AdapterRecord

TOKENS: Final = 2048
"""Tokens of the sample on which an artifact runs with each adapter, at most."""


@dataclass(frozen=True)
class AdapterFigures:
    """What came out of running an artifact with one of its adapters.

    Attributes:
        name: the adapter's name.
        tokens: how many tokens it ran on.
        quantization: the quantized base with the float adapter, against the float base with it.
        lowering: the artifact with the adapter, against the quantized base with it.
        total: the artifact with the adapter, against the float base with it.
        change: the float base with the adapter, against the float base alone.
    """

    name: str
    tokens: int
    quantization: Divergence
    lowering: Divergence
    total: Divergence
    change: Divergence


def run_adapters(
    folder: Path,
    manifest: Manifest,
    model: Model,
    made: References,
    blocks: Sequence[Sequence[int]],
    threads: int | None,
    runtime: Mapping[str, str | None],
    progress: Callable[[str, int, int], None],
) -> Iterator[AdapterFigures]:
    """Runs an artifact with each of its adapters.

    Args:
        folder: the artifact.
        manifest: its manifest.
        model: the base.
        made: what the artifact without an adapter is held against.
        blocks: token ids, each a fresh text.
        threads: for the runtime; None for its default.
        runtime: further options of any runtimes, by name.
        progress: told of each stage.

    Raises:
        CheckpointError: an adapter is not where it was.
        DeviceError: the artifact does not run with it.
    """
    few = list(_first(blocks, TOKENS))
    for record in manifest.separate_adapters:
        stage = partial(progress, f"adapter {record.name}")
        options = {**taken_options(manifest.target, runtime), "adapter": record.name}
        yield _run(folder, manifest, record, model, made, few, threads, options, stage)


def _run(
    folder: Path,
    manifest: Manifest,
    record: AdapterRecord,
    model: Model,
    made: References,
    blocks: list[Sequence[int]],
    threads: int | None,
    options: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> AdapterFigures:
    import torch
    from torch import Tensor

    from device_harness.device_session import open_on
    from device_harness.devices.host import HostDevice
    from edgeforge.reference.walk import ReferenceRunner, store_reader
    from edgeforge.verification.chosen_experts import RouterReader, artifact_routers
    from edgeforge.verification.comparison import compare
    from edgeforge.verification.metrics import DivergenceMeter
    from edgeforge.verification.references import find_adapter, require_same

    given = find_adapter(record)
    (adapter,) = open_adapters([given])
    require_same(record, adapter)
    pairs = low_rank(model, adapter)
    method, beside = model.weights.method, partial(added, pairs)
    weights = model.weights
    change: Callable[[str, Tensor], Tensor] | None = beside
    if method is None or isinstance(method, DecodableMethod):
        # Merged by other code than that which made the pairs. Integers that stay take no adapter.
        tuned = open_model(
            str(model.checkpoint.place),
            ignore_config=model.ignored_config,
            exit_layer=model.exit_layer,
            adapters=[given],
        )
        weights, change = tuned.weights, None
    original = ReferenceRunner(
        made.original.program,
        lambda input: weights.float_weight(input.name),
        weights.float_rows,
        change,
    )
    quantized = ReferenceRunner(made.quantized.program, store_reader(made.store), added=beside)
    with open_on(HostDevice(), folder, manifest, threads, options) as session:
        routers, readers = quantized.routers, []
        if routers:
            readers = [RouterReader(session, artifact_routers(folder, manifest), routers)]
        (found,) = compare(blocks, original, quantized, [session], progress, readers)
    first, meter = torch.tensor(blocks[0], dtype=torch.int64), DivergenceMeter()
    meter.add(next(made.original.logits([first])), next(original.logits([first])))
    return AdapterFigures(
        record.name,
        sum(map(len, blocks)),
        found.quantization,
        found.lowering,
        found.total,
        meter.result(),
    )


def judged_adapters(found: Sequence[AdapterFigures], bounds: dict[str, Bound]) -> list[Checked]:
    """Holds what lowering adds with each adapter against the bounds of the artifact without one."""
    bound = bounds["lowering.kl_mean"]
    return [
        decide(replace(bound, name=f"adapter.{each.name}.{bound.name}"), each.lowering.kl_mean)
        for each in found
    ]


def _first(blocks: Sequence[Sequence[int]], tokens: int) -> Iterator[Sequence[int]]:
    """The first blocks of so many tokens together, one block at least."""
    taken = 0
    for block in blocks:
        if taken and taken + len(block) > tokens:
            return
        taken += len(block)
        yield block
