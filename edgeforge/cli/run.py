"""The command ``run``: a text continued by an artifact, or a message answered."""

from __future__ import annotations

import sys

from edgeforge.cli import adapter_options, chat_options
from edgeforge.cli import options as option
from edgeforge.cli.chat import emit
from edgeforge.cli.printable import json_text, printable


def run(
    artifact: option.Artifact,
    prompt: option.Prompt,
    max_tokens: option.MaxTokens = 128,
    temperature: option.Temperature = 0.0,
    top_p: option.TopP = 1.0,
    seed: option.DrawSeed = 0,
    threads: option.Threads = None,
    device: option.RunDevice = "host",
    speculate: option.Speculate = None,
    draft: option.Draft = None,
    ngram: option.Ngram = None,
    adapter: adapter_options.RunAdapter = None,
    chat: chat_options.IsChat = False,
    system: chat_options.System = None,
    chat_template: chat_options.Template = None,
    template_value: chat_options.Values = None,
    json: option.Json = False,
) -> None:
    """Continue a text with an artifact, token by token, or answer a message (--chat)."""
    from edgeforge.cli.progress import Reporter
    from edgeforge.errors import UsageError
    from edgeforge.generation.conversation import Answer, ChatOptions, open_conversation
    from edgeforge.generation.drafters import speculation_of
    from edgeforge.generation.generate import Generated, generate
    from edgeforge.generation.sampling import Sampling

    given = {
        "--system": system,
        "--chat-template": chat_template,
        "--template-value": template_value,
    }
    switched = adapter_options.only_one(adapter)
    lost = [name for name, value in given.items() if value is not None]
    if lost and not chat:
        raise UsageError(f"{lost[0]} is for conversations: add --chat, or leave it out")
    if chat and (speculate, draft, ngram) != (None, None, None):
        raise UsageError(
            "--speculate continues a text and cannot answer a message: leave --chat out"
        )
    progress = Reporter()  # lines, for a bar would be drawn over the text
    result: Answer | Generated
    if chat:
        values = chat_options.template_values(template_value)
        sampling = Sampling(temperature, top_p, seed)
        asked = ChatOptions(system, chat_template, values, max_tokens, sampling)
        with open_conversation(
            artifact, asked, threads=threads, device=device, adapter=switched, progress=progress
        ) as conversation:
            result = conversation.say(prompt, None if json else emit)
    else:
        result = generate(
            artifact,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            threads=threads,
            device=device,
            speculation=speculation_of(speculate, draft, ngram),
            adapter=switched,
            emit=None if json else emit,
            progress=progress,
        )
    if json:
        print(json_text(result.to_json()))
    else:
        print()
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        print(printable(result.summary()), file=sys.stderr)
        spoken = result.speculation if isinstance(result, Generated) else None
        for line in spoken.lines(len(result.tokens)) if spoken else ():
            print(printable(line), file=sys.stderr)
