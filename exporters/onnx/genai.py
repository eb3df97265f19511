"""The configuration that onnxruntime-genai reads beside a graph, and graphs that it cannot load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from exporters.target import ExportRequest, ModelFacts
from quant.processors import default_threads
from quant.program.states import State, states_of

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
# The states of which onnxruntime-genai makes one tensor's shape for all layers, by their names.
_OF_ONE_SHAPE: Final[Mapping[str, str]] = {
    ".recurrent_state": "memories",
    ".conv_state": "states of recent tokens",
}


def genai_config(request: ExportRequest, filename: str) -> dict[str, object]:
    """The content of ``genai_config.json``.

    The model type tells onnxruntime-genai which inputs and outputs a graph has, not what the graph
    computes: ``llama`` is token ids, an attention mask, and caches of every layer; ``lfm2`` has
    the state of a short convolution in place of some layers' caches. It reads the caches' widths
    from the graph. In every model it looks for layers with a memory by the names of their states,
    ``past_key_values.N.conv_state`` and ``past_key_values.N.recurrent_state``.
    """
    facts, program = request.facts, request.program
    states = list(states_of(program))
    remembers = any(state.kind == "memory" for state in states)
    recent = [] if remembers else [state for state in states if state.kind == "recent"]
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


def refusals(states: Iterable[tuple[str, tuple[int | str, ...]]]) -> tuple[str, ...]:
    """Says why onnxruntime-genai cannot load a graph, one sentence each; empty where it can.

    Each was found with onnxruntime-genai 0.18. It gives all layers states of one layer's shape, and
    looks for the states of short convolutions only in a model without memories.

    Args:
        states: the name and the shape of each input that is a state, without the batch.

    >>> refusals([("past_key_values.0.conv_state", (96, 3)), ("past.1.conv", (64, 2))])[0][:72]
    'onnxruntime-genai cannot load this artifact: layer 1 is a short convolut'
    """
    given = list(states)
    shapes: dict[str, dict[tuple[int | str, ...], str]] = {end: {} for end in _OF_ONE_SHAPE}
    for name, shape in given:
        for end, found in shapes.items():
            if name.endswith(end):
                found.setdefault(shape, name.removesuffix(end).rpartition(".")[2])
    told = [
        f"all layers must have {words} of one shape there, and "
        + " and ".join(
            f"layer {layer} has {' x '.join(map(str, shape))}"
            for shape, layer in list(shapes[end].items())[:2]
        )
        for end, words in _OF_ONE_SHAPE.items()
        if len(shapes[end]) > 1
    ]
    short = [name.split(".")[1] for name, _ in given if name.endswith(".conv")]
    if short and any(shapes.values()):
        told.insert(0, f"layer {short[0]} is a short convolution beside layers with a recurrence")
    return tuple(
        f"onnxruntime-genai cannot load this artifact: {reason} (ONNX Runtime alone, `edgeforge "
        f"run` and `verify` are not concerned)"
        for reason in told
    )


def _layer_kinds(facts: ModelFacts, recent: list[State]) -> dict[str, object]:
    """Which layers have caches, and which the recent tokens of a convolution, and how many."""
    kinds = ["full_attention" if heads else "conv" for heads in facts.num_kv_heads]
    return {"layer_types": kinds, "conv_cache_size": recent[0].shape[2]}
