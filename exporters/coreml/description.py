"""Sentences and metadata that a package carries for people and apps."""

from __future__ import annotations

from exporters.coreml import names
from exporters.coreml.emitter import Emitter
from exporters.coreml.lowering import Style
from exporters.coreml.package_writer import Metadata
from exporters.target import ExportRequest


def describe_function(emitter: Emitter, style: Style) -> dict[str, str]:
    """A sentence by input, output and state."""
    texts = {
        names.TOKENS: "Token ids, in the order of the text.",
        names.POSITION: "How many tokens the caches hold already.",
        names.LOGITS: (
            "Logits of the token after each of these."
            if emitter.name == names.VERIFY
            else "Logits of the token after the last of these."
        ),
    }
    for value in (*emitter.states, *emitter.inputs, *emitter.outputs):
        if value.name not in texts:
            kind = "Keys" if value.name.startswith("key") else "Values"
            texts[value.name] = f"{kind} of the tokens so far, [1, heads, context, head width]."
    return texts


def metadata(request: ExportRequest, chunks: tuple[int, ...]) -> Metadata:
    """What Xcode shows and what swift-transformers and Apple's samples look for."""
    facts = request.facts
    return Metadata(
        description=f"A {facts.model_type} language model, written by EdgeForge.",
        version="1",
        author="",
        licence="",
        user_defined={"com.edgeforge.context": str(facts.context)},
    )


def notes(request: ExportRequest, style: Style, chunks: tuple[int, ...]) -> tuple[str, ...]:
    """What a user must know."""
    return ()
