"""The ExecuTorch target: one .pte with two methods over the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from exporters.errors import ExportError
from exporters.options import Choices, TargetOptions
from exporters.palettes import refuse_palettes
from exporters.target import ExportRequest, Lowered, ModelFacts
from quant.formats import IntFormat
from quant.plan import SIGNED, QuantPlan

MODEL: Final = "model.pte"
GENERATE, VERIFY = "forward", "logits_all"
# Tokens of one run at most: longer prompts go in pieces. More would not be faster, and every
# buffer between kernels is as long.
CHUNK_TOKENS: Final = 128
GROUP_MULTIPLE: Final = 32


class ExecutorchTarget:
    """ExecuTorch with the XNNPACK delegate, for CPUs of phones."""

    name = "executorch"
    about = "ExecuTorch with XNNPACK on CPU, Android and iOS (also through its LLM runner)"
    options: Choices = MappingProxyType({})

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses formats that XNNPACK's kernels do not have or would silently get wrong."""
        refuse_palettes(plan, "XNNPACK")
        for weight, assignment in plan.weights.items():
            if isinstance(assignment.format, IntFormat):
                _check_format(weight, assignment.format)
            if assignment.algorithm == SIGNED:
                raise ExportError(
                    f"{weight} is to be filled by {SIGNED}; XNNPACK takes no scales below zero: "
                    f"use rtn"
                )

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes ``model.pte`` and the tokenizer that runners read beside it."""
        from exporters.executorch.lowering import MethodLowering
        from exporters.executorch.method import constant_method
        from exporters.executorch.pte_file import PteFile
        from exporters.last_token import keep_last_token

        program, facts, file = request.program, request.facts, PteFile()
        limit = min(program.context, CHUNK_TOKENS)
        methods = {GENERATE: keep_last_token(program), VERIFY: program}
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
        file.write(folder / MODEL)
        for name, path in request.tokenizer_files.items():
            shutil.copyfile(path, folder / name)
        quantized = any(isinstance(f, IntFormat) for f in request.store.plan.formats())
        return Lowered(
            entry=MODEL,
            inputs={"tokens": f"int64[1, t <= {limit}]", "position": "int64[1]"},
            outputs={
                GENERATE: f"float32[1, 1, {program.vocab_size}]",
                VERIFY: f"float32[1, t, {program.vocab_size}]",
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
    if format.scale_dtype != "bfloat16":
        raise ExportError(
            f"{weight} is {format.name}; XNNPACK holds scales as bfloat16: round them with "
            f"--imported-scales bfloat16, which keeps the integers and changes no scale by more "
            f"than 0.2 %"
        )
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
