"""Every planted fault by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporters.target import ExportRequest
from quant.program import dialect
from quant.program.program import Program
from tests.planted_faults import edits, programs, stores
from tests.planted_faults.captured import Captured
from tests.planted_faults.written import Change, Fault

WRONG_EPSILON = 1e-2
WINDOWS = (16, 64)
FIRST_WRONG = 64


def _theta(captured: Captured) -> Change:
    rope = captured.run.model.spec.rope
    return lambda program: programs.with_rope(program, replace(rope, theta=50 * rope.theta))


def _late_rope(captured: Captured) -> Change:
    rope = captured.run.model.spec.rope
    other = replace(rope, theta=50 * rope.theta)
    return lambda program: programs.with_rope(program, other, FIRST_WRONG)


def _sets(captured: Captured) -> Change:
    rope = captured.run.model.spec.rope
    other = replace(rope, short_factor=rope.long_factor, long_factor=rope.short_factor)
    return lambda program: programs.with_rope(program, other)


def _window(size: int) -> Callable[[Captured], Change]:
    return lambda captured: lambda program: programs.with_window(program, size)


def _plain(change: Change) -> Callable[[Captured], Change]:
    return lambda captured: change


def _dropped(program: Program) -> Program:
    return programs.without_norm(program, "model.layers.1.post_attention_layernorm.weight")


def _nibbles(share: float | None) -> Callable[[ExportRequest, Path], ExportRequest]:
    def change(request: ExportRequest, apart: Path) -> ExportRequest:
        weights = stores.in_four_bits(request.store)
        chosen = weights[-1:] if share is None else weights
        changed = stores.with_nibbles(share)
        return replace(
            request, store=stores.altered(request.store, apart, chosen, "codes", changed)
        )

    return change


def _transposed(request: ExportRequest, apart: Path) -> ExportRequest:
    weights = stores.in_groups(request.store)
    store = stores.altered(request.store, apart, weights, "scale", stores.transposed)
    return replace(request, store=store)


def _stale_tokenizer(request: ExportRequest, apart: Path) -> ExportRequest:
    """The tokenizer's file before some of its tokens changed places."""
    files = dict(request.tokenizer_files)
    data = json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    places = sorted(vocabulary, key=vocabulary.get)[8:]
    for one, other in zip(places[::2], places[1::2], strict=False):
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    stale = apart / "tokenizer.json"
    stale.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return replace(request, tokenizer_files={**files, "tokenizer.json": stale})


def _wrong_end(request: ExportRequest, apart: Path) -> ExportRequest:
    ends = tuple(end - 1 for end in request.facts.eos)
    return replace(request, facts=replace(request.facts, eos=ends))


_SWAPPED = {
    "onnx": edits.swap_onnx_caches,
    "coreml": edits.swap_coreml_caches,
}
_LATE = {
    "onnx": edits.late_onnx_positions,
    "coreml": edits.late_coreml_positions,
}

FAULTS = (
    Fault("rope-theta", "rope theta 50 times as large", "meaning.rope_theta", everywhere=_theta),
    Fault(
        "rope-64",
        "rope wrong from position 64, in the shipped graph only",
        "meaning.rope_tables",
        shipped=_late_rope,
    ),
    *(
        fault
        for size in WINDOWS
        for fault in (
            Fault(
                f"window-{size}",
                f"a window of {size}, in all graphs",
                "meaning.window",
                everywhere=_window(size),
            ),
            Fault(
                f"window-{size}-shipped",
                f"a window of {size}, in the shipped graph only",
                "meaning.window",
                shipped=_window(size),
            ),
        )
    ),
    Fault(
        "eps",
        "norms' epsilon 1e-2",
        "meaning.norm_eps",
        everywhere=_plain(lambda program: programs.with_epsilon(program, WRONG_EPSILON)),
    ),
    Fault(
        "gate-up",
        "gate and up swapped",
        "meaning.gate",
        everywhere=_plain(programs.with_gates_swapped),
    ),
    Fault("scales", "scales transposed", weights=True, request=_transposed),
    Fault("nibble", "one nibble", weights=True, request=_nibbles(None)),
    Fault("nibbles-1000", "one nibble in a thousand", weights=True, request=_nibbles(1e-3)),
    Fault("nibbles-10", "one nibble in ten", weights=True, request=_nibbles(0.1)),
    Fault(
        "caches",
        "caches of two layers swapped",
        "meaning.caches",
        edit=_SWAPPED,
        within={"executorch": edits.swapped_executorch_caches},
    ),
    Fault(
        "position",
        "positions off by one",
        "meaning.positions",
        edit=_LATE,
        within={"executorch": edits.late_executorch_positions},
    ),
    Fault("tokenizer", "a stale tokenizer", "tokenizer", request=_stale_tokenizer),
    Fault("eos", "a wrong end of text", "eos", request=_wrong_end),
    Fault(
        "rope-sets",
        "long and short rope sets exchanged",
        "meaning.rope_set",
        everywhere=_sets,
        fits=lambda captured: captured.run.model.spec.rope.scaling == "longrope",
    ),
    Fault("norm", "a norm dropped", "meaning.norms", everywhere=_plain(_dropped)),
)
"""All faults but one: another checkpoint's weights, which `other_weights` makes of a second one."""


def _bias_left_out(program: Program) -> Program:
    return programs.without(program, dialect.BIAS, "model.layers.1.mlp.down_proj.bias")


def _empty_states(folder: Path, captured: Captured) -> None:
    """A text's first call takes what a convolution's state holds, in place of zeros."""

    def change(node) -> None:
        if node.output[0] == "row_begins":
            node.input[1] = "zero"

    edits.edit_onnx(folder, change)


VOCABULARY_FAULTS = (
    Fault("bias", "a bias left out", "meaning.biases", everywhere=_plain(_bias_left_out)),
    Fault(
        "window-of-a-layer",
        "another window in one layer",
        "meaning.window",
        everywhere=_plain(lambda program: programs.with_window(program, 24, layer=0)),
    ),
    Fault(
        "attention-softcap",
        "no softcap on attention's scores",
        "meaning.attention_softcap",
        everywhere=_plain(lambda program: programs.with_attention(program, softcap=0.0)),
    ),
    Fault(
        "logit-softcap",
        "no softcap on the logits",
        "meaning.logit_softcap",
        everywhere=_plain(lambda program: programs.without(program, dialect.SOFTCAP)),
    ),
    Fault(
        "rotation",
        "a rotation where none must be",
        "meaning.rope_type",
        everywhere=_plain(lambda program: programs.with_rotation(program, layer=1)),
    ),
    Fault(
        "multiplier",
        "a multiplier dropped",
        "meaning.embedding_multiplier",
        everywhere=_plain(lambda program: programs.without_factor(program, 2.0)),
    ),
    Fault(
        "state", "a convolution's state not reset", "meaning.states", edit={"onnx": _empty_states}
    ),
)
"""Faults in what only some families have, planted in a model that has all of it."""


def other_weights(other: Captured) -> Fault:
    """The fault of an artifact with the weights of another checkpoint of the same shapes."""
    return Fault(
        "weights",
        "another checkpoint's weights",
        "meaning.norm_weights",
        weights=True,
        request=lambda request, apart: replace(request, store=other.request.store),
    )
