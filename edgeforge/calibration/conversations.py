"""Sequences of the conversations that ship, for a model that is asked to talk."""

from __future__ import annotations

import json
from typing import Final

from edgeforge.chat.template import find_template
from edgeforge.errors import CheckpointError
from edgeforge.model.model import CONVERSATIONS, Model
from edgeforge.tokenizer import Tokenizer

# Templates that tell the date tell this one, for the same sequences on every day.
_DATE: Final = "2026-01-31"


def shipped_conversations(
    model: Model, tokenizer: Tokenizer, most: int, length: int
) -> tuple[tuple[int, ...], ...]:
    """Returns sequences of conversations in the model's own template; none if it has no template.

    A sequence begins where a conversation begins. Conversations follow each other until it is
    full, and what is left of the last one is dropped.

    Args:
        model: the opened model.
        tokenizer: its tokenizer.
        most: how many sequences to return at most.
        length: tokens of each.

    Raises:
        CheckpointError: the template cannot write them, or writes tokens the model does not have.
    """
    template = find_template(model.checkpoint.tokenizer_files)
    if template is None:
        return ()
    speakers = ("user", "assistant")
    conversations = [
        [{"role": speakers[at % 2], "content": content} for at, content in enumerate(turns)]
        for turns in json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    ]
    found: list[list[int]] = [[]]
    for text in template.render(conversations, today=_DATE):
        if len(found[-1]) >= length:
            found.append([])
        found[-1] += tokenizer.encode(text, special=False)
    chats = tuple(tuple(each[:length]) for each in found if len(each) >= length)[:most]
    largest = max((token for each in chats for token in each), default=0)
    if largest >= model.spec.vocab_size:
        raise CheckpointError(
            f"the chat template in {template.source} writes token {largest}, but the model has "
            f"{model.spec.vocab_size} tokens"
        )
    return chats
