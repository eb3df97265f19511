"""The interface of a target: what it is given, what it must do, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from exporters.float_columns import FloatColumns
from exporters.options import Choices, TargetOptions
from exporters.recurrence_size import RecurrenceSize
from exporters.runtime_memory import Footprint
from exporters.structure import Section

if TYPE_CHECKING:  # these import torch, which listing the targets does not need
    import numpy as np
    import numpy.typing as npt

    from quant.plans.plan import QuantPlan
    from quant.program.program import Program
    from quant.store.store import WeightStore

    CacheRanges = Mapping[str, npt.NDArray[np.float32]]
    """How far from zero each column of a cache reaches: float32[kv_heads, head_dim] by name."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model that the runtimes' own configuration files ask for.

    Attributes:
        model_type: the checkpoint's ``model_type``.
        hidden_size: the width of the residual stream.
        head_dim: the width of one attention head.
        num_heads: the number of query heads of each layer.
        num_kv_heads: the number of key/value heads of each layer.
        bos: the token that begins a text, if there is one.
        eos: the tokens that end a text.
        pad: the padding token, if there is one.
        context: the declared context, in tokens.
        rope_width: columns of all rotary tables together, cosines and sines; None for one pair of
            tables of a head's width.
        recent: numbers that the states of short convolutions and token shifts hold, of all layers
            together.
        memory: numbers that the memories of recurrences hold, of all layers together.
        recurrences: the recurrences of its layers; equal ones once.
        adapter_numbers: numbers of the factors of all adapters that lie beside the weights.
        attention_softcap: the bound on attention's scores by a tanh; 0 for none.
        experts: the largest number of experts in a mixture; 0 where no layer has one.
        chosen_experts: the largest number of experts that a mixture computes for a token.
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
    rope_width: int | None = None
    recent: int = 0
    memory: int = 0
    recurrences: tuple[RecurrenceSize, ...] = ()
    adapter_numbers: int = 0
    attention_softcap: float = 0.0
    experts: int = 0
    chosen_experts: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where the weights come from, for the metadata that apps show; unknown fields are empty.

    Attributes:
        title: the name to show.
        hub_id: ``organisation/name``, by which apps find the tokenizer.
        author: who made the weights.
        licence: the licence of the weights.
    """

    title: str = ""
    hub_id: str = ""
    author: str = ""
    licence: str = ""


@dataclass(frozen=True)
class ExportRequest:
    """One program and its weights, to be written for one target.

    Attributes:
        program: the program, in the quantized dialect.
        store: the store of the weights that the program names.
        facts: facts about the model, for configuration files.
        tokenizer_files: the tokenizer's files by the names they must have in the artifact; may
            be empty.
        generation: the checkpoint's ``generation_config.json``, or an empty mapping.
        options: the options that this target takes.
        provenance: where the weights come from.
        cache_ranges: the range of every cache on the calibration text; empty unless the value of
            ``kv_cache`` is one of the target's ``static_caches``.
        float_columns: the columns whose activations are to stay float32, by weight.
    """

    program: Program
    store: WeightStore
    facts: ModelFacts
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    generation: Mapping[str, object] = field(default_factory=dict)
    options: TargetOptions = field(default_factory=TargetOptions)
    provenance: Provenance = field(default_factory=Provenance)
    cache_ranges: CacheRanges = field(default_factory=dict)
    float_columns: FloatColumns = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """What a target wrote.

    Attributes:
        entry: the file that a runtime opens for generation.
        inputs: the entry's inputs by name, each as ``dtype[dims]``.
        outputs: the entry's outputs, in the same form.
        states: what the model carries from call to call, in the same form.
        notes: what a user must know, one sentence each.
        warnings: what is not as a user expects, one sentence each; ``export`` prints them.
        float_columns: the columns whose activations stay float32 in what was written, by weight.
    """

    entry: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: Mapping[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    float_columns: FloatColumns = field(default_factory=dict)


class Target(Protocol):
    """A runtime's file format.

    Attributes:
        name: the target's key in `exporters.registry.TARGETS`.
        about: one line for ``edgeforge list targets``.
        options: the options that the target takes, each with the values it knows; an empty tuple
            allows any value.
        passed_over: the options that other targets take and this one cannot, each with the
            reason as a clause that follows the target's name in a message.
        static_caches: the values of ``kv_cache`` that need `ExportRequest.cache_ranges`.
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
        """Refuses, before any work, what the file format or the runtime's kernels cannot hold.

        Args:
            plan: the format of every weight.
            shapes: the shape of every weight.
            facts: facts about the model.
            options: the options that this target takes.

        A refused format is a `WeightRefused`: the product replaces its advice by what all chosen
        targets accept.

        Raises:
            ExportError: names the weight or dimension, and what to use instead.
        """

    def footprint(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> Footprint:
        """Returns the memory that a runtime takes for the model, estimated before any work.

        Args:
            plan: the format of every weight.
            shapes: the shape of every weight.
            facts: facts about the model.
            options: the options that this target takes.
        """

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes the model's files into an existing folder.

        A target copies the weights from the store and does not hold a whole weight in memory.
        """

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digests, by weight name, of the integers and scales that the written files hold.

        A digest equals the one in `quant.store.store.WeightStore.digests` when the files hold the
        weight's integers and scales bit for bit.
        """

    def structure(self, folder: Path) -> tuple[Section, ...]:
        """What the written files consist of, read from them, for ``edgeforge inspect``.

        Raises:
            ExportError: a file is missing or damaged.
        """
