"""The Core ML target: one package of functions that share every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from exporters.checks import check_draft_positions
from exporters.coreml import names
from exporters.coreml.closed_form import closed_form
from exporters.errors import ExportError
from exporters.footprint import check_memory, estimate
from exporters.options import Choices, TargetOptions
from exporters.runtime_memory import Footprint, RuntimeCosts
from exporters.structure import Section
from exporters.target import ExportRequest, Lowered, ModelFacts
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from exporters.coreml.emitter import Emitter
    from exporters.coreml.function import Value
    from exporters.coreml.state import Style

DEFAULT_CHUNK: Final = 64


class CoremlTarget:
    """Core ML's ML programs, for iPhones, iPads and Macs."""

    name = "coreml"
    about = "Core ML for iPhone, iPad and Mac: an .mlpackage with states, for GPU or Neural Engine"
    options: Choices = MappingProxyType(
        {
            "strip": (),
            "profile": ("gpu", "ane"),
            "chunk": (),
            "cache_write": ("slice", "onehot"),
            "opset": ("ios18", "ios17"),
            "max_memory": (),
            "draft_positions": (),
        }
    )
    passed_over: Mapping[str, str] = MappingProxyType(
        {
            "kv_cache": "whose caches are float16, because Core ML's states hold nothing else",
            "activations": "whose products take float16 activations and round them no further",
        }
    )
    static_caches: tuple[str, ...] = ()

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses options that exclude each other, and formats that a package cannot hold."""
        from exporters.coreml.choices import check_formats

        style = choose_style(options, facts.context)
        check_draft_positions(options, facts.context)
        check_formats(plan, shapes, options)
        footprint = self.footprint(plan, shapes, facts, options)
        # A prefill call holds numbers of all pairs of its tokens (`exporters.coreml.closed_form`).
        too_long = bool(facts.recurrences) and footprint.run_tokens > 1
        shorter = too_long and footprint.weights < (options.max_memory or 0)
        note = ", or prefill fewer tokens at a time (--chunk)" if shorter else ""
        check_memory(self.name, footprint, style.context, options.max_memory, note=note)

    def footprint(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> Footprint:
        """What Core ML keeps, as far as that can be known without it."""
        from exporters.coreml.carried import ANE_MULTIPLE

        style, chunks = choose_style(options, facts.context), choose_chunks(options, facts.context)
        kept = estimate(plan, shapes, stored_facts(facts, style), costs(style, chunks))
        # The context's caches are padded where the profile pads widths.
        return replace(kept, context_multiple=1 if style.wide else ANE_MULTIPLE)

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes ``model.mlpackage`` and the tokenizer's files beside it."""
        from exporters.coreml.app_tokenizer import write_tokenizer
        from exporters.coreml.description import describe_function, metadata, notes
        from exporters.coreml.lowering import lower_function
        from exporters.coreml.package_writer import WrittenFunction, model_message, write_manifest
        from exporters.coreml.state import OPSETS, FunctionLowering
        from exporters.coreml.weight_file import WeightFile
        from exporters.coreml.weights import WeightBank
        from exporters.last_token import keep_last_token

        facts, options = request.facts, request.options
        style = choose_style(options, facts.context)
        chunks = choose_chunks(options, facts.context)
        file = WeightFile()
        bank = WeightBank(request.store, file)
        last = keep_last_token(request.program)
        several = chunks[0] if len(chunks) == 1 else -1
        plans = [(names.DECODE, request.program, 1), (names.PREFILL, last, several)]
        if options.draft_positions is not None:
            plans.append((names.DRAFT, request.program, options.draft_positions))
        if not options.strip:
            plans.append((names.VERIFY, request.program, max(chunks)))
        if not style.states:
            chunks = tuple(dict.fromkeys((1, *chunks)))
            plans = [(names.MAIN, last, -1 if len(chunks) > 1 else 1)]
        functions = []
        for name, program, tokens in plans:
            given = chunks if tokens == -1 else ()
            most = max(given, default=tokens)
            emitter = lower_function(FunctionLowering(program, bank, name, tokens, style, most))
            functions.append(WrittenFunction(emitter, given, describe_function(emitter)))
        model = model_message(functions, OPSETS[style.opset][1], metadata(request, style, chunks))
        package = folder / names.PACKAGE
        (package / names.WEIGHTS_PATH).parent.mkdir(parents=True)
        (package / names.MODEL_PATH).write_bytes(model.SerializeToString(deterministic=True))
        file.write(package / names.WEIGHTS_PATH)
        write_manifest(package)
        write_tokenizer(request.tokenizer_files, folder)
        return Lowered(
            entry=names.PACKAGE,
            inputs=_inputs(functions[0].emitter),
            outputs={
                f"{f.emitter.name}.{value.name}": _type_text(value)
                for f in functions
                for value in f.emitter.outputs
                if value.name == names.LOGITS
            },
            states={
                value.name: _type_text(value)
                for value in functions[0].emitter.states
                or [v for v in functions[0].emitter.inputs if _is_cache(v)]
            },
            notes=notes(request, style, chunks),
        )

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digests of the integers and scales that the package's functions and weight file hold."""
        from exporters.coreml.reader import stored_digests

        return stored_digests(folder / names.PACKAGE)

    def structure(self, folder: Path) -> tuple[Section, ...]:
        """Tables of every function's operations and stored weights."""
        from exporters.coreml.package import open_package
        from exporters.coreml.structure import structure_of

        return structure_of(open_package(folder / names.PACKAGE))


def choose_style(options: TargetOptions, context: int) -> Style:
    """Chooses how functions are written.

    Raises:
        ExportError: the options exclude each other.
    """
    from exporters.coreml.carried import padded
    from exporters.coreml.state import Style

    profile, opset = options.profile or "gpu", options.opset or "ios18"
    assert profile in ("gpu", "ane") and opset in ("ios17", "ios18")
    if opset == "ios17" and options.cache_write == "slice":
        raise ExportError(
            "--cache-write slice needs an operator that iOS 18 introduced: leave it out, or use "
            "--opset ios18"
        )
    if opset == "ios17" and options.draft_positions is not None:
        raise ExportError(
            "--draft-positions needs a function of its own, and a package for iOS 17 holds only "
            "one: leave it out, or use --opset ios18"
        )
    write = options.cache_write or ("onehot" if opset == "ios17" else "slice")
    length = padded(context) if profile == "ane" else context
    return Style(profile, opset, write == "onehot", length)  # type: ignore[arg-type]


def costs(style: Style, chunks: tuple[int, ...]) -> RuntimeCosts:
    """What Core ML keeps in memory: one constant for embedding and head, and float16 caches.

    Whether Core ML unpacks weights when it loads them cannot be known here; the estimate counts
    them as they are stored.
    """
    # Without states, a call holds two copies of the caches: its inputs and its outputs.
    return RuntimeCosts(
        cache_element=2 if style.states else 4,
        state_element=2 if style.states else 4,
        memory_element=4 if style.states else 8,
        tied_copies=1,
        run_tokens=max(chunks),
        scores=True,
        recurrence=closed_form,
        adapter_element=2,
    )


def stored_facts(facts: ModelFacts, style: Style) -> ModelFacts:
    """The model's facts with the head width that the caches have, which a profile may pad."""
    from exporters.coreml.carried import padded

    return facts if style.wide else replace(facts, head_dim=padded(facts.head_dim))


def choose_chunks(options: TargetOptions, context: int) -> tuple[int, ...]:
    """The numbers of tokens that a prefill call may take: one number, or several.

    Raises:
        ExportError: the option ``chunk`` is not a list of positive numbers.
    """
    text = options.chunk or str(min(DEFAULT_CHUNK, context))
    try:
        chunks = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        chunks = (0,)
    if chunks[0] < 1:
        raise ExportError(
            f"--chunk {text} is not possible: give the number of tokens of one prefill call, such "
            f"as 64, or several to choose from, such as 16,64,256"
        )
    return tuple(sorted({min(chunk, context) for chunk in chunks}))


def _inputs(emitter: Emitter) -> dict[str, str]:
    return {value.name: _type_text(value) for value in emitter.inputs if not _is_cache(value)}


def _is_cache(value: Value) -> bool:
    return value.name not in (names.TOKENS, names.POSITION)


def _type_text(value: Value) -> str:
    sizes = ", ".join("t" if size < 0 else str(size) for size in value.shape)
    return f"{value.dtype}[{sizes}]"
