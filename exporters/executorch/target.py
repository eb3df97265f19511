"""The ExecuTorch target: one .pte with two methods over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from exporters.checks import (
    ACTIVATIONS,
    activation_notes,
    check_draft_positions,
    check_float_activations,
    refuse_activation,
    refuse_palettes,
)
from exporters.errors import ExportError
from exporters.executorch.backends import BACKENDS, XNNPACK, Backend, check_backend, is_stock
from exporters.executorch.installed import SUPPORTED
from exporters.float_columns import Columns, FloatColumns, told
from exporters.footprint import check_memory, estimate
from exporters.options import Choices, TargetOptions
from exporters.runtime_memory import Footprint, RuntimeCosts
from exporters.structure import Section
from exporters.target import ExportRequest, Lowered, ModelFacts
from quant.formats.activations import NONE, TENSOR
from quant.formats.formats import IntFormat
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from quant.program.program import Program

MODEL, WEIGHTS = "model.pte", "model.ptd"
GENERATE, DRAFT, VERIFY = "forward", "draft", "logits_all"
# The largest number of tokens of one run; longer prompts go in pieces. A larger number would not be
# faster, and the buffers between kernels grow with it.
CHUNK_TOKENS: Final = 128
# XNNPACK packs a copy of every matrix when it loads it, and an embedding's table is read from the
# file, so that a tied matrix is held twice. The file holds it twice, too: once in each kernel's
# layout; a file of external weights holds most such matrices once.
COSTS: Final = RuntimeCosts(
    cache_element=4, tied_copies=2, run_tokens=CHUNK_TOKENS, stored_copies=2
)


def has_int8_caches(options: TargetOptions) -> bool:
    """Whether keys and values are kept as int8."""
    return options.kv_cache == "int8"


def _costs(facts: ModelFacts, options: TargetOptions) -> RuntimeCosts:
    """What the runtime keeps; int8 caches have a scale and a zero point for each token and head."""
    costs = replace(COSTS, stored_copies=1) if options.weights == "external" else COSTS
    if facts.attention_softcap:  # delegates hold the scores that ExecuTorch's kernel does not
        costs = replace(costs, scores=True)
    if not has_int8_caches(options):
        return costs
    # A row of int8 codes has a float32 scale (4 bytes) and an int8 zero point (1 byte).
    return replace(costs, cache_element=(facts.head_dim + 4 + 1) / facts.head_dim)


class ExecutorchTarget:
    """ExecuTorch, by default with the XNNPACK delegate, for CPUs of phones."""

    name = "executorch"
    about = "ExecuTorch with XNNPACK on CPU, Android and iOS (also through its LLM runner)"
    options: Choices = MappingProxyType(
        {
            "strip": (),
            "weights": ("internal", "external"),
            "lowering": ("edgeforge", "stock"),
            "backend": tuple(BACKENDS),
            "kv_cache": ("fp32", "int8"),
            "activations": ACTIVATIONS,
            "max_memory": (),
            "draft_positions": (),
        }
    )
    passed_over: Mapping[str, str] = MappingProxyType({})
    static_caches: tuple[str, ...] = ()  # the runtime computes int8 caches' scales for each token

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses options that exclude each other, and formats that a delegate cannot compute."""
        refuse_palettes(plan, BACKENDS[options.backend or XNNPACK].title)
        check_backend(plan, options)
        if is_stock(options):
            _check_stock_operators(facts)
        if has_int8_caches(options) and not any(facts.num_kv_heads):
            raise ExportError(
                f"this {facts.model_type} model has no attention, and so no keys and values to "
                f"keep in 8 bits: leave out --kv-cache int8"
            )
        check_float_activations(plan, options)
        check_draft_positions(options, facts.context)
        refuse_activation(
            plan,
            TENSOR,
            why="XNNPACK's products by fixed scales would round their results too",
            use="activation int8-token, as recipe w8a8 does",
        )
        footprint = self.footprint(plan, shapes, facts, options)
        check_memory(self.name, footprint, facts.context, options.max_memory)

    def footprint(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> Footprint:
        """What ExecuTorch keeps."""
        return estimate(plan, shapes, facts, _costs(facts, options))

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes ``model.pte``, ``model.ptd`` for external weights, and the tokenizer's files."""
        from exporters.executorch.runner_tokenizer import write_tokenizer
        from exporters.last_token import keep_last_token

        program, options = request.program, request.options
        name = options.backend or XNNPACK
        backend = BACKENDS[name]
        limit = min(program.context, backend.tokens or CHUNK_TOKENS)
        methods = {GENERATE: keep_last_token(program)}
        if options.draft_positions is not None:
            methods[DRAFT] = keep_last_token(program, options.draft_positions)
        if limit > 1 and not options.strip:  # with one token a run, `forward` gives all logits
            methods[VERIFY] = program
        constants = _constants(request, limit)
        if is_stock(options):
            from exporters.executorch.stock.write import write_stock

            write_stock(methods, request.store, constants, limit, name, folder / MODEL)
            kept: FloatColumns = {}
        else:
            kept = _write(methods, request, constants, limit, folder)
        warnings = write_tokenizer(request.tokenizer_files, folder)
        return Lowered(
            entry=MODEL,
            inputs={"tokens": f"int64[1, t <= {limit}]", "position": "int64[1]"},
            outputs={
                method: f"float32[1, {rows}, {program.vocab_size}]"
                for method, rows in (
                    (GENERATE, "1"),
                    (DRAFT, f"t <= {options.draft_positions}"),
                    (VERIFY, "t"),
                )
                if method in methods
            },
            states=_states(program, options),
            notes=_notes(request, backend, limit, kept),
            warnings=(*_warnings(backend), *warnings),
            float_columns=kept,
        )

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digests of the integers and scales that the program's segments hold."""
        from exporters.executorch import reader
        from exporters.executorch.stock import names

        if (folder / names.NAMES).is_file():
            return names.stored_digests(folder / MODEL)
        return reader.stored_digests(folder / MODEL)

    def structure(self, folder: Path) -> tuple[Section, ...]:
        """Tables of the program's delegates, other operators, weight formats and segments."""
        from exporters.executorch.reader import read_pte
        from exporters.executorch.structure import structure_of

        return structure_of(read_pte(folder / MODEL))


def _check_stock_operators(facts: ModelFacts) -> None:
    """Refuses what is not written for ExecuTorch's own exporter.

    Raises:
        ExportError: names the operator.
    """
    for asked, operator in (
        (facts.memory, "recurrent layers"),
        (facts.recent, "short convolutions with a state"),
        (facts.attention_softcap, "attention with bounded scores"),
        (facts.experts, "mixtures of experts"),
    ):
        if asked:
            raise ExportError(
                f"this {facts.model_type} model has {operator}, which EdgeForge does not write for "
                f"ExecuTorch's own exporter: leave out --lowering stock and --backend"
            )


def _notes(
    request: ExportRequest, backend: Backend, limit: int, kept: FloatColumns
) -> tuple[str, ...]:
    """What a user must know about the artifact, one sentence each."""
    notes = [f"one run takes at most {limit} tokens: longer prompts go in pieces"]
    plan = request.store.plan
    quantized = any(
        isinstance(given.format, IntFormat) and given.activation == NONE
        for given in plan.weights.values()
    )
    promised = activation_notes(plan)
    notes += promised
    if quantized and request.options.activations == "float":
        notes.append("no matrix product rounds its activations")
    elif quantized and backend is BACKENDS[XNNPACK]:
        others = "other matrix" if promised else "matrix"
        notes.append(f"{others} products round each token's activations to 8 bits")
        notes += [told(kept)] if told(kept) else []
    notes += _kernel_notes(request.program)
    if has_int8_caches(request.options):
        rounded = "keys and values" if is_capped(request.program) else "queries, keys and values"
        notes += [
            f"attention rounds {rounded} to 8 bits, with a scale and a zero point for each token "
            f"and head",
            "in measurements on x86, runs at late positions of a text took 2 to 4 times as long as "
            "with float32 caches",
        ]
    if request.options.draft_positions is not None:
        notes.append(
            f"the method {DRAFT} gives the logits of the last {request.options.draft_positions} "
            f"tokens of a run, or of all where there are fewer: an app that speculates loads it "
            f"instead of {GENERATE}, as each method has caches of its own"
        )
    if is_stock(request.options):
        notes.append(f"lowered by ExecuTorch {SUPPORTED}'s own exporter")
    return (*notes, *backend.notes)


def is_capped(program: Program) -> bool:
    """Whether attention bounds its scores."""
    from quant.program import dialect
    from quant.program.calls import AttentionCall

    return any(
        node.target is dialect.ATTENTION and AttentionCall.of(node).softcap != 0
        for node in program.graph.nodes
    )


def _kernel_notes(program: Program) -> list[str]:
    """What runs outside of the delegates besides attention's own kernels, one sentence each."""
    notes = []
    if is_capped(program):
        notes.append(
            "no kernel of ExecuTorch bounds attention's scores: the delegates compute attention, "
            "and kernels outside of them copy the keys and values that a run sees"
        )
    if any(program.placeholders("memory")):
        notes.append(
            "a recurrent layer is a loop over a run's tokens around a delegate of one token, and "
            "its memory is float32: a text's last tokens cannot be taken back"
        )
    elif any(program.placeholders("recent")):
        notes.append(
            "short convolutions run in the delegates, and kernels outside of them keep the tokens "
            "that they read: a text's last tokens cannot be taken back"
        )
    if _mixes(program):
        notes.append(
            "of a mixture's experts only those run that a token of the run chose: each is a "
            "delegate of its own, which the method jumps past; kernels outside of the delegates "
            "choose the experts and gather their tokens"
        )
    return notes


def _mixes(program: Program) -> bool:
    """Whether a layer is a mixture of experts."""
    from quant.program import dialect

    return any(node.target is dialect.COMBINE for node in program.graph.nodes)


def _warnings(backend: Backend) -> tuple[str, ...]:
    """What is not as a user expects of the artifact, one sentence each."""
    if backend.needs is None:
        return ()
    return (f"produced but not executed here: it needs {backend.needs}",)


def _states(program: Program, options: TargetOptions) -> dict[str, str]:
    """The states as ``dtype[dims]``, by name; int8 caches have zero points and scales too."""
    states = {}
    for node, given in program.placeholders("recent"):
        _, columns, tokens = node.meta["val"].shape
        states[given.name] = f"float32[1, {tokens}, {columns}]"
    for node, given in program.placeholders("memory"):
        _, heads, rows, columns = node.meta["val"].shape
        states[given.name] = f"float32[{heads}, {rows}, {columns}]"
    for node, given in program.placeholders("cache"):
        _, heads, context, width = node.meta["val"].shape
        if has_int8_caches(options):
            states[given.name] = f"int8[1, {context}, {heads}, {width}]"
            states[f"{given.name}.zero_point"] = f"int8[1, {context}, {heads}, 1]"
            states[f"{given.name}.scale"] = f"float32[1, {context}, {heads}, 1]"
        else:
            states[given.name] = f"float32[1, {context}, {heads}, {width}]"
    return states


def _constants(request: ExportRequest, limit: int) -> dict[str, int | bool | list[int]]:
    """The constants that runners ask a model for, by method name."""
    program, facts = request.program, request.facts
    constants: dict[str, int | bool | list[int]] = {
        "get_max_seq_len": limit,
        "get_max_context_len": program.context,
        "get_vocab_size": program.vocab_size,
        "get_n_layers": len(facts.num_heads),
        "enable_dynamic_shape": limit > 1,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "get_eos_ids": list(dict.fromkeys(facts.eos)),
    }
    if facts.bos is not None:
        constants["get_bos_id"] = facts.bos
    return constants


def _write(
    methods: Mapping[str, Program],
    request: ExportRequest,
    constants: Mapping[str, int | bool | list[int]],
    limit: int,
    folder: Path,
) -> FloatColumns:
    """Writes the program with EdgeForge's own lowering, which does not need ExecuTorch.

    Returns:
        The columns whose activations stay float32.
    """
    from exporters.executorch.blobs import Blob
    from exporters.executorch.lowering import lower_method
    from exporters.executorch.method import constant_method
    from exporters.executorch.ptd_file import MARK, MARK_OF_PTE, PtdFile, weights_mark
    from exporters.executorch.pte_file import PteFile
    from exporters.executorch.state import CacheDtype, MethodLowering

    weights = PtdFile() if request.options.weights == "external" else None
    file = PteFile(weights)
    kept: dict[str, Columns] = {}
    cache_dtype: CacheDtype = "int8" if has_int8_caches(request.options) else "float32"
    for name, program in methods.items():
        state = MethodLowering(
            program, request.store, file, name, limit, cache_dtype, request.float_columns
        )
        file.plans.append(lower_method(state).plan())
        kept |= state.kept
    file.plans.extend(constant_method(name, value) for name, value in constants.items())
    if weights is not None:
        mark = Blob(weights_mark(request.store.digests))
        weights.add(MARK, mark)
        file.named(MARK_OF_PTE, mark)
        weights.write(folder / WEIGHTS)
    file.write(folder / MODEL)
    return kept
