"""Descriptions and metadata that a package carries for people and apps."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Final

from exporters.checks import activation_notes
from exporters.coreml import names
from exporters.coreml.carried import ANE_MULTIPLE
from exporters.coreml.emitter import Emitter
from exporters.coreml.memory import FINER, UNIT
from exporters.coreml.package_writer import Metadata
from exporters.coreml.state import Style
from exporters.coreml.stream import (
    has_mixtures,
    has_recurrences,
    may_exceed_half,
    wide_stream,
)
from exporters.target import ExportRequest
from quant.formats.formats import FloatFormat
from quant.program.calls import AttentionCall
from quant.program.dialect import ATTENTION, SOFTCAP
from quant.program.program import Program
from quant.program.states import states_of
from quant.store.store import WeightStore

# swift-transformers reads this key to find the tokenizer; Apple's samples use it too.
_HUB_NAME = "co.huggingface.exporters.name"

_STREAM: Final = (
    "models of this kind were trained in bfloat16, and some have residual streams beyond 65504, "
    "the largest float16: `verify` says whether this one has, and --profile gpu keeps the stream "
    "in float32"
)
# What the states are whose names begin so: what they hold, of which tokens, in which shape.
_HELD: Final = (
    ("key", "Keys", "the tokens so far", "[1, heads, context, width]"),
    ("value", "Values", "the tokens so far", "[1, heads, context, width]"),
    ("conv", "A convolution's inputs", "the last tokens", "[1, tokens, width]"),
    ("shift", "What a layer mixes with the next token", "the last token", "[1, 1, width]"),
    (
        "channelShift",
        "What a mix of channels mixes with the next token",
        "the last token",
        "[1, 1, width]",
    ),
    (
        "memoryHigh",
        "A recurrence's memory, the larger part,",
        "the tokens so far",
        "[1, heads, rows, columns]",
    ),
    (
        "memoryLow",
        "What the larger part of a recurrence's memory leaves out,",
        "the tokens so far",
        "[1, heads, rows, columns]",
    ),
)


def describe_function(emitter: Emitter) -> dict[str, str]:
    """A sentence that describes each input, output and state, by name."""
    after = "each" if emitter.name in (names.DRAFT, names.VERIFY) else "the last"
    texts = {
        names.TOKENS: "Token ids, in the order of the text.",
        names.POSITION: "How many tokens the caches hold already; 0 begins a text.",
        names.LOGITS: f"Scores of every token of the vocabulary to come after {after} of these.",
    }
    for value in (*emitter.states, *emitter.inputs, *emitter.outputs):
        if value.name not in texts:
            kind, holds, shape = next(
                told for begin, *told in _HELD if value.name.startswith(begin)
            )
            now = ", with these tokens" if value.name.endswith(names.UPDATED) else ""
            texts[value.name] = f"{kind} of {holds}{now}: {shape}."
    return texts


def metadata(request: ExportRequest, style: Style, chunks: tuple[int, ...]) -> Metadata:
    """The metadata that Xcode and apps read from a package."""
    facts, origin = request.facts, request.provenance
    own = {
        "version": version("edgeforge"),
        "model_type": facts.model_type,
        "recipe": request.store.plan.recipe,
        "profile": style.profile,
        "context_length": str(facts.context),
        "prefill_tokens": ",".join(map(str, chunks)),
        "vocabulary_size": str(request.program.vocab_size),
        "bos_token_id": "" if facts.bos is None else str(facts.bos),
        "eos_token_ids": ",".join(map(str, facts.eos)),
        "tokenizer": "tokenizer.json" if "tokenizer.json" in request.tokenizer_files else "",
    }
    user_defined = {f"edgeforge.{key}": text for key, text in own.items() if text}
    if origin.hub_id:
        user_defined[_HUB_NAME] = origin.hub_id
    return Metadata(
        description=(
            f"{origin.title or facts.model_type}, a language model: tokens in, scores of the next "
            f"token out; {facts.context} tokens of context"
        ),
        version=version("edgeforge"),
        author=origin.author,
        licence=origin.licence,
        user_defined=user_defined,
    )


def notes(request: ExportRequest, style: Style, chunks: tuple[int, ...]) -> tuple[str, ...]:
    """What a user must know, one sentence each."""
    return (
        _calls(style, chunks),
        *_drafts(request),
        *_profile(request, style),
        *_mixtures(request.program, style),
        *_states(request.program),
        *_floats(request.store, style),
        *activation_notes(request.store.plan),
        *([] if style.states else [_no_states(request, style)]),
        "EdgeForge cannot verify without a Mac whether Core ML's own compiler accepts the package, "
        "on which processor it places each operation, and how that processor rounds; `verify` says "
        "what ran the package",
    )


def _calls(style: Style, chunks: tuple[int, ...]) -> str:
    if not style.states:
        lengths = " or ".join(map(str, chunks))
        return f"a call of {names.MAIN} takes exactly {lengths} token{'s' * (chunks != (1,))}"
    return (
        f"a call of {names.PREFILL} takes exactly {' or '.join(map(str, chunks))} tokens; the rest "
        f"of a prompt goes through {names.DECODE}, one token at a time"
    )


def _drafts(request: ExportRequest) -> tuple[str, ...]:
    positions = request.options.draft_positions
    if positions is None:
        return ()
    return (
        f"a call of {names.DRAFT} takes exactly {positions} tokens, a shorter draft with any "
        f"tokens behind it, and gives the logits of each; the next call's position says how many "
        f"of them count",
    )


def _profile(request: ExportRequest, style: Style) -> tuple[str, ...]:
    stream, caps = wide_stream(request.program), _has_caps(request.program)
    if style.wide:
        wide = ["norms", "rotary tables", *["softcaps"] * caps, *["residual stream"] * bool(stream)]
        wide += ["routers and the sums of experts' results"] * has_mixtures(request.program)
        wide += ["recurrences with their decays"] * has_recurrences(request.program)
        return (
            f"written for the GPU (profile gpu): float16 except for {', '.join(wide[:-1])} and "
            f"{wide[-1]}, which are float32",
        )
    context, padded = request.facts.context, style.context
    width = request.facts.head_dim
    stored = math.ceil(width / ANE_MULTIPLE) * ANE_MULTIPLE
    plain = "no float32 arithmetic"
    if has_recurrences(request.program):
        plain = (
            "no float32 arithmetic but that of recurrences, which float16 would spoil and which "
            "Core ML therefore runs on another processor"
        )
    return (
        f"written for the Neural Engine (profile ane): {plain}; each norm first divides by the "
        f"largest magnitude; attention is matrix products and a softmax",
        f"the caches' last two dimensions are multiples of {ANE_MULTIPLE}: {padded} positions for "
        f"a context of {context}, {stored} columns for heads of {width}",
        *([_STREAM] if may_exceed_half(request.program) else []),
    )


def _mixtures(program: Program, style: Style) -> tuple[str, ...]:
    if not has_mixtures(program):
        return ()
    if style.wide:
        return (
            "of a mixture of experts, a call computes only the experts that one of its tokens "
            "chose, each for all tokens of the call and in a branch of its own (MIL's cond); "
            "without a Mac EdgeForge cannot know which processor runs branches, or whether Core ML "
            "keeps in memory the weights of experts that it skips",
        )
    return (
        "of a mixture of experts, every call computes all experts for all of its tokens, because "
        "the Neural Engine has no branches; what a token did not choose is dropped",
        "routers are rounded to float16 here: a token to which two experts are nearly equal may "
        "go to the other one; --profile gpu chooses in float32",
    )


def _has_caps(program: Program) -> bool:
    """Whether scores or logits are bounded by a tanh."""
    return any(
        node.target is SOFTCAP or (node.target is ATTENTION and AttentionCall.of(node).softcap > 0)
        for node in program.graph.nodes
    )


def _states(program: Program) -> tuple[str, ...]:
    kinds = {state.kind for state in states_of(program)}
    if kinds <= {"cache"}:
        return ()
    kept = "convolutions keep the last tokens' inputs"
    if "memory" in kinds:
        kept = "recurrent layers keep a memory and the last tokens' inputs"
    told = (
        f"{kept}, so that a call at another position than 0 must follow the call before it: a "
        f"shorter position takes no tokens back",
    )
    if "memory" not in kinds:
        return told
    return (
        *told,
        f"a memory is kept in two float16 states, {UNIT:g} * (memoryHigh + memoryLow / {FINER:g}), "
        f"which hold 22 bits of it, to {UNIT * 65504:g}: what is larger becomes NaN, which "
        f"`verify` would say",
    )


def _floats(store: WeightStore, style: Style) -> tuple[str, ...]:
    """Notes on how weights of other float dtypes than float16 are stored and used."""
    wide = [
        name
        for name, assignment in store.plan.weights.items()
        if isinstance(assignment.format, FloatFormat) and assignment.format.dtype != "float16"
    ]
    matrices = [
        name
        for name in wide
        if store.extents(name)["value"].shape[0] > 1 and not name.endswith(names.FLOAT)
    ]
    told = []
    if matrices:
        told.append(
            f"{len(matrices)} matrices that are not float16 are stored and multiplied as float32"
        )
    if not style.wide and len(wide) > len(matrices):
        told.append(
            "norms' weights and other small ones are stored as they are and rounded to float16 "
            "when the model is loaded"
        )
    return tuple(told)


def _no_states(request: ExportRequest, style: Style) -> str:
    facts = request.facts
    nbytes = sum(4 * heads * style.context * facts.head_dim for heads in facts.num_kv_heads)
    nbytes += 2 * facts.recent + 4 * facts.memory
    return (
        f"iOS 17 has no states: the caches, {nbytes / 1e6:.1f} MB, go into every call as inputs "
        f"and come out as outputs whose names end in {names.UPDATED}; the first call takes zeros. "
        f"A package for iOS 17 holds only one function, so that no function gives the logits of "
        f"all positions at once"
    )
