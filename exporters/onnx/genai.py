"""The files that onnxruntime-genai reads beside a graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from exporters.target import ExportRequest, ModelFacts
from quant.processors import default_threads
from quant.program.states import State, states_of

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(request: ExportRequest, filename: str) -> dict[str, object]:
    """The content of ``genai_config.json``.

    The model type tells onnxruntime-genai which inputs and outputs a graph has, not what the graph
    computes: ``llama`` is token ids, an attention mask, and caches of every layer; ``lfm2`` has
    the state of a short convolution in place of some layers' caches. It reads the caches' widths
    from the graph.
    """
    facts, program = request.facts, request.program
    recent = [state for state in states_of(program) if state.kind == "recent"]
    model: dict[str, object] = {
        "type": "lfm2" if recent else "llama",
        "vocab_size": program.vocab_size,
        "context_length": program.context,
        "decoder": {
            "filename": filename,
            # Without a number here, onnxruntime-genai runs on one thread.
            "session_options": {
                "log_id": "onnxruntime-genai",
                "intra_op_num_threads": default_threads(),
                "provider_options": [],
            },
            "hidden_size": facts.hidden_size,
            "head_size": facts.head_dim,
            "num_attention_heads": max(facts.num_heads),
            "num_key_value_heads": max(facts.num_kv_heads),
            "num_hidden_layers": len(facts.num_heads),
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
                **({"past_conv_names": "past.%d.conv"} if recent else {}),
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
                **({"present_conv_names": "present.%d.conv"} if recent else {}),
            },
            **(_layer_kinds(facts, recent) if recent else {}),
        },
    }
    if facts.bos is not None:
        model["bos_token_id"] = facts.bos
    if facts.eos:
        model["eos_token_id"] = list(facts.eos)
    pad = facts.pad if facts.pad is not None else next(iter(facts.eos), None)
    if pad is not None:
        model["pad_token_id"] = pad
    search: dict[str, object] = {
        "max_length": program.context,
        "past_present_share_buffer": True,
        "num_beams": 1,
        "do_sample": bool(request.generation.get("do_sample", False)),
    }
    search |= {k: v for k in _SAMPLING if isinstance(v := request.generation.get(k), int | float)}
    return {"model": model, "search": search}


def _layer_kinds(facts: ModelFacts, recent: list[State]) -> dict[str, object]:
    """Which layers have caches, and which the recent tokens of a convolution, and how many."""
    kinds = ["full_attention" if heads else "conv" for heads in facts.num_kv_heads]
    return {"layer_types": kinds, "conv_cache_size": recent[0].shape[2]}


def write_tokenizer(files: Mapping[str, Path], folder: Path) -> None:
    """Copies the tokenizer's files and states the tokenizer's class for onnxruntime-genai.

    Some byte-level tokenizers state Llama's class, for which onnxruntime-genai splits text by
    another pattern; so the class becomes ``PreTrainedTokenizerFast``. Where the checkpoint has no
    ``tokenizer_config.json``, one is written, because onnxruntime-genai does not load a tokenizer
    without it. ``add_bos_token`` and ``add_eos_token`` are left out: onnxruntime-genai would follow
    them against the post-processor of ``tokenizer.json``, which alone counts in transformers.
    """
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if "tokenizer.json" not in files:
        return
    target = folder / "tokenizer_config.json"
    config = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    if _is_byte_level(json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("add_bos_token", "add_eos_token"):
        config.pop(name, None)
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _is_byte_level(tokenizer: Mapping[str, object]) -> bool:
    stages = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    while stages:
        stage = stages.pop()
        if isinstance(stage, dict):
            if stage.get("type") == "ByteLevel":
                return True
            stages.extend(stage.get("pretokenizers") or stage.get("decoders") or [])
    return False
