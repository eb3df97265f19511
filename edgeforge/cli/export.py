"""The commands ``export`` and ``export-adapter``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeforge.cli import adapter_options, export_options
from edgeforge.cli import options as option
from edgeforge.cli.cache_warning import print_cache_warning
from edgeforge.cli.printable import printable

if TYPE_CHECKING:
    from exporters.manifest import Manifest


def export(
    model: export_options.Model,
    out: option.Out,
    target: export_options.Targets = "onnx",
    recipe: export_options.Recipe = None,
    rotation: export_options.Rotation = None,
    imported_scales: export_options.ImportedScales = "float16",
    context: export_options.Context = None,
    tokenizer: export_options.Tokenizer = None,
    revision: export_options.Revision = None,
    ignore_config: export_options.IgnoreConfig = None,
    strip: export_options.Strip = False,
    weights: export_options.Weights = None,
    profile: export_options.Profile = None,
    chunk: export_options.Chunk = None,
    cache_write: export_options.CacheWrite = None,
    opset: export_options.Opset = None,
    lowering: export_options.Lowering = None,
    backend: export_options.Backend = None,
    kv_cache: export_options.KvCache = None,
    activations: export_options.Activations = None,
    max_memory: export_options.MaxMemory = None,
    draft_positions: export_options.DraftPositions = None,
    exit_layer: export_options.ExitLayer = None,
    adapter: adapter_options.Adapters = None,
    adapter_mode: adapter_options.AdapterMode = "merged",
    bits_per_weight: export_options.BitsPerWeight = None,
    max_size: export_options.MaxSize = None,
    max_kl: export_options.MaxKl = None,
    save_plan: export_options.SavePlan = None,
    calibrate: export_options.Calibrate = True,
    calibration: export_options.Calibration = None,
    calibration_tokens: export_options.CalibrationTokens = None,
    calibration_length: export_options.CalibrationLength = 256,
    seed: export_options.CalibrationSeed = 0,
    resume: export_options.Resume = None,
    force: option.Force = False,
    threads: option.Threads = None,
    quiet: option.Quiet = False,
) -> None:
    """Trace and quantize a model, and write it for one or more runtimes."""
    from edgeforge import api
    from edgeforge.cli.progress import Reporter
    from edgeforge.planning.vocabulary import vocabulary_note
    from edgeforge.sizes import parse_size, size_text
    from exporters.manifest import Manifest

    with Reporter(quiet) as progress:
        folders = api.export(
            model,
            out,
            targets=[name.strip() for name in target.split(",")],
            recipe=recipe,
            rotation=rotation,
            imported_scales=imported_scales,
            context=context,
            tokenizer=tokenizer,
            revision=revision,
            ignore_config=ignore_config or (),
            strip=strip,
            weights=weights,
            profile=profile,
            chunk=chunk,
            cache_write=cache_write,
            opset=opset,
            lowering=lowering,
            backend=backend,
            kv_cache=kv_cache,
            activations=activations,
            max_memory=None if max_memory is None else parse_size(max_memory),
            draft_positions=draft_positions,
            exit_layer=exit_layer,
            adapters=adapter or (),
            adapter_mode=adapter_mode,
            bits_per_weight=bits_per_weight,
            max_size=None if max_size is None else parse_size(max_size),
            max_kl=max_kl,
            save_plan=save_plan,
            calibrate=calibrate,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            calibration_length=calibration_length,
            seed=seed,
            resume=resume,
            force=force,
            threads=threads,
            progress=progress,
        )
    manifests = [Manifest.read(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        size = size_text(sum(record.size for record in manifest.files.values()))
        line = f"{folder}: {manifest.target}, {manifest.recipe}, context {manifest.context}, "
        print(printable(f"{line}{manifest.bits_per_weight:.3f} bits a weight, {size}"))
    records = manifests[0].weights
    told = vocabulary_note(
        manifests[0].recipe,
        {name: record.format for name, record in records.items()},
        {name: record.shape for name, record in records.items()},
    )
    if told:
        print(printable(told))
    _print_warnings(manifests)


def export_adapter(
    artifact: option.Artifact,
    adapter: adapter_options.AdapterFolder,
    checkpoint: option.CheckpointPlace = None,
    quiet: option.Quiet = False,
) -> None:
    """Add an adapter to an artifact that is already out, beside its weights."""
    from edgeforge import api
    from edgeforge.cli.progress import Reporter

    with Reporter(quiet) as progress:
        name = api.export_adapter(artifact, adapter, checkpoint=checkpoint, progress=progress)
    print(printable(f"{artifact}: adapter {name} added; edgeforge run --adapter {name}"))


def _print_warnings(manifests: Sequence[Manifest]) -> None:
    """Prints each warning once, on stderr, with the targets that it concerns if not all."""
    from edgeforge.cli.exits import one_line
    from quant.kernels import native

    print_cache_warning()
    if not native.available():
        print(
            "warning: quantization ran without compiled kernels, with the same results but slowly: "
            "`edgeforge doctor` says how to get them",
            file=sys.stderr,
        )
    for warning in dict.fromkeys(each for manifest in manifests for each in manifest.warnings):
        concerned = [manifest.target for manifest in manifests if warning in manifest.warnings]
        where = f"{', '.join(concerned)}: " if len(concerned) < len(manifests) else ""
        print(one_line(f"warning: {where}{warning}"), file=sys.stderr)
