"""Descriptions and metadata that a package carries for people and apps."""

from __future__ import annotations

import math
from importlib.metadata import version

from exporters.checks import activation_notes
from exporters.coreml import names
from exporters.coreml.carried import ANE_MULTIPLE
from exporters.coreml.emitter import Emitter
from exporters.coreml.package_writer import Metadata
from exporters.coreml.state import Style
from exporters.target import ExportRequest
from quant.formats.formats import FloatFormat
from quant.store.store import WeightStore

# swift-transformers reads this key to find the tokenizer; Apple's samples use it too.
_HUB_NAME = "co.huggingface.exporters.name"


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
            kind = "Keys" if value.name.startswith("key") else "Values"
            now = ", with these tokens" if value.name.endswith(names.UPDATED) else ""
            texts[value.name] = f"{kind} of the tokens so far{now}: [1, heads, context, width]."
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
    if style.wide:
        return (
            "written for the GPU (profile gpu): float16 except for norms and rotary tables, which "
            "are float32",
        )
    context, padded = request.facts.context, style.context
    width = request.facts.head_dim
    stored = math.ceil(width / ANE_MULTIPLE) * ANE_MULTIPLE
    return (
        "written for the Neural Engine (profile ane): no float32 arithmetic; each norm first "
        "divides by the largest magnitude; attention is matrix products and a softmax",
        f"the caches' last two dimensions are multiples of {ANE_MULTIPLE}: {padded} positions for "
        f"a context of {context}, {stored} columns for heads of {width}",
    )


def _floats(store: WeightStore, style: Style) -> tuple[str, ...]:
    """Notes on how weights of other float dtypes than float16 are stored and used."""
    wide = [
        name
        for name, assignment in store.plan.weights.items()
        if isinstance(assignment.format, FloatFormat) and assignment.format.dtype != "float16"
    ]
    matrices = [name for name in wide if store.extents(name)["value"].shape[0] > 1]
    told = []
    if matrices:
        told.append(
            f"{len(matrices)} matrices that are not float16 are stored and multiplied as float32"
        )
    if not style.wide and len(wide) > len(matrices):
        told.append(
            "norms' weights are stored as they are and rounded to float16 when the model is loaded"
        )
    return tuple(told)


def _no_states(request: ExportRequest, style: Style) -> str:
    facts = request.facts
    nbytes = sum(4 * heads * style.context * facts.head_dim for heads in facts.num_kv_heads)
    return (
        f"iOS 17 has no states: the caches, {nbytes / 1e6:.1f} MB, go into every call as inputs "
        f"and come out as outputs whose names end in {names.UPDATED}; the first call takes zeros. "
        f"A package for iOS 17 holds only one function, so that no function gives the logits of "
        f"all positions at once"
    )
