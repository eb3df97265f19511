"""What every target is given, what it must do, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from exporters.options import Choices, TargetOptions
from exporters.structure import Section

if TYPE_CHECKING:  # torch comes with these; listing targets needs none of it
    import numpy as np
    import numpy.typing as npt

    from quant.plans.plan import QuantPlan
    from quant.program.program import Program
    from quant.store.store import WeightStore

    CacheRanges = Mapping[str, npt.NDArray[np.float32]]
    """By cache of a program, how far its columns reach from zero: float32[kv_heads, head_dim]."""


@dataclass(frozen=True)
class ModelFacts:
    """What runtimes' own configuration files ask for beside the graph.

    Attributes:
        model_type: the checkpoint's.
        hidden_size: width of the residual stream.
        head_dim: width of one attention head.
        num_heads: query heads, layer by layer.
        num_kv_heads: key/value heads, layer by layer.
        bos: token that begins a text, if any.
        eos: tokens that end one.
        pad: padding token, if any.
        context: declared context, tokens.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    num_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    context: int


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, for the metadata that apps show; empty where it is not known.

    Attributes:
        title: a name to show.
        hub_id: ``organisation/name``, by which apps find the tokenizer.
        author: who made the weights.
        licence: of the weights.
    """

    title: str = ""
    hub_id: str = ""
    author: str = ""
    licence: str = ""


@dataclass(frozen=True)
class ExportRequest:
    """One program and its weights, to be written for one target.

    Attributes:
        program: in the quantized dialect.
        store: the weights it names.
        facts: for configuration files.
        tokenizer_files: by the names they must have in the artifact; may be empty.
        generation: the checkpoint's ``generation_config.json``, or an empty mapping.
        options: those that this target takes.
        provenance: of the weights.
        cache_ranges: of every cache on the calibration text, where the target has asked for them.
    """

    program: Program
    store: WeightStore
    facts: ModelFacts
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    generation: Mapping[str, object] = field(default_factory=dict)
    options: TargetOptions = field(default_factory=TargetOptions)
    provenance: Provenance = field(default_factory=Provenance)
    cache_ranges: CacheRanges = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """What a target wrote.

    Attributes:
        entry: the file that a runtime opens for generation.
        inputs: its inputs, each ``dtype[dims]``.
        outputs: its outputs, likewise.
        states: what it carries from call to call, likewise.
        notes: what a user must know, one sentence each.
    """

    entry: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: Mapping[str, str]
    notes: tuple[str, ...] = ()


class Target(Protocol):
    """A runtime's file format.

    Attributes:
        name: the key of `exporters.registry.TARGETS`.
        about: one line for ``edgeforge list targets``.
        options: the options it takes, each with the values it knows (none listed: any).
        passed_over: options that it cannot take though others do, each with the reason: a clause
            after its name.
        static_caches: values of ``kv_cache`` that need `ExportRequest.cache_ranges`.
    """

    name: str
    about: str
    options: Choices
    passed_over: Mapping[str, str]
    static_caches: tuple[str, ...]

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses, before any work, what the format or its kernels cannot hold.

        Raises:
            ExportError: says which weight or dimension, and what to use instead.
        """

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes the model's files into an existing folder; holds no weight in memory."""

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digest by weight of the integers and scales as the written files hold them.

        Comparable with `quant.store.store.WeightStore.digests`: equal when they are equal bit for
        bit.
        """

    def structure(self, folder: Path) -> tuple[Section, ...]:
        """What the written files consist of, read from them: what ``edgeforge inspect`` shows.

        Raises:
            ExportError: a file is missing or damaged.
        """
