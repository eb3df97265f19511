"""The ExecuTorch target: one .pte with two methods over the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from exporters.errors import ExportError
from exporters.footprint import RuntimeCosts, check_memory, estimate
from exporters.options import Choices, TargetOptions
from exporters.palettes import refuse_palettes
from exporters.target import ExportRequest, Lowered, ModelFacts
from quant.formats import IntFormat
from quant.plan import QuantPlan

MODEL, WEIGHTS = "model.pte", "model.ptd"
GENERATE, VERIFY = "forward", "logits_all"
# Tokens of one run at most: longer prompts go in pieces. More would not be faster, and every
# buffer between kernels is as long.
CHUNK_TOKENS: Final = 128
GROUP_MULTIPLE: Final = 32
# XNNPACK packs every matrix anew when it loads it; an embedding's table is read where it lies.
COSTS: Final = RuntimeCosts(cache_element=4, tied_copies=2, run_tokens=CHUNK_TOKENS)


class ExecutorchTarget:
    """ExecuTorch with the XNNPACK delegate, for CPUs of phones."""

    name = "executorch"
    about = "ExecuTorch with XNNPACK on CPU, Android and iOS (also through its LLM runner)"
    options: Choices = MappingProxyType(
        {"strip": (), "weights": ("internal", "external"), "max_memory": ()}
    )

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses formats that XNNPACK's kernels do not have or would silently get wrong."""
        refuse_palettes(plan, "XNNPACK")
        footprint = estimate(plan, shapes, facts, COSTS)
        check_memory(self.name, footprint, facts.context, options.max_memory)
        for weight, assignment in plan.weights.items():
            if isinstance(assignment.format, IntFormat):
                _check_format(weight, assignment.format)

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes ``model.pte`` and the tokenizer that runners read beside it."""
        from exporters.executorch.blobs import Blob
        from exporters.executorch.lowering import MethodLowering
        from exporters.executorch.method import constant_method
        from exporters.executorch.ptd_file import MARK, MARK_OF_PTE, PtdFile, weights_mark
        from exporters.executorch.pte_file import PteFile
        from exporters.last_token import keep_last_token

        program, facts = request.program, request.facts
        weights = PtdFile() if request.options.weights == "external" else None
        file = PteFile(weights)
        limit = min(program.context, CHUNK_TOKENS)
        methods = {GENERATE: keep_last_token(program)}
        if not request.options.strip:
            methods[VERIFY] = program
        for name, given in methods.items():
            lowering = MethodLowering(given, request.store, file, name, limit)
            file.plans.append(lowering.run().plan())
        metadata: dict[str, int | bool | list[int]] = {
            "get_max_seq_len": limit,
            "get_max_context_len": program.context,
            "get_vocab_size": program.vocab_size,
            "get_n_layers": len(facts.num_heads),
            "enable_dynamic_shape": True,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "get_eos_ids": list(dict.fromkeys(facts.eos)),
        }
        if facts.bos is not None:
            metadata["get_bos_id"] = facts.bos
        file.plans.extend(constant_method(name, value) for name, value in metadata.items())
        if weights is not None:
            mark = Blob(weights_mark(request.store.digests))
            weights.add(MARK, mark)
            file.named(MARK_OF_PTE, mark)
            weights.write(folder / WEIGHTS)
        file.write(folder / MODEL)
        for name, path in request.tokenizer_files.items():
            shutil.copyfile(path, folder / name)
        quantized = any(isinstance(f, IntFormat) for f in request.store.plan.formats())
        return Lowered(
            entry=MODEL,
            inputs={"tokens": f"int64[1, t <= {limit}]", "position": "int64[1]"},
            outputs={
                name: f"float32[1, {1 if name == GENERATE else 't'}, {program.vocab_size}]"
                for name in methods
            },
            states={
                given.name: "float32[1, {2}, {1}, {3}]".format(*node.meta["val"].shape)
                for node, given in program.placeholders("cache")
            },
            notes=(
                f"one run takes {limit} tokens at most: longer prompts go in pieces",
                *(
                    ("matrix products round each token's activations to 8 bits",)
                    if quantized
                    else ()
                ),
            ),
        )

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digests of the integers and scales as the program's segments hold them."""
        from exporters.executorch.reader import stored_digests

        return stored_digests(folder / MODEL)


def _check_format(weight: str, format: IntFormat) -> None:
    """Refuses an integer format.

    Raises:
        ExportError: what is wrong with it, and what to use.
    """
    size = format.group_size
    if not format.symmetric:
        raise ExportError(
            f"{weight} is to be {format.name}; XNNPACK ignores zero points, which would give "
            f"wrong numbers: use {IntFormat(format.bits, size).name}"
            + (" or int8-pc" if format.bits == 4 else "")
        )
    if format.bits == 8 and size is not None:
        raise ExportError(
            f"{weight} is to be {format.name}; XNNPACK holds 8 bits with one scale a row only: use "
            f"int8-pc, or int4-g{size}"
        )
    if size is not None and size % GROUP_MULTIPLE:
        raise ExportError(
            f"{weight} has groups of {size}; XNNPACK's need a multiple of {GROUP_MULTIPLE}: use "
            f"int4-g32, int4-g64 or int4-g128, or int8-pc"
        )
