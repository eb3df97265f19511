"""`BenchOptions`: what a user asks of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from device_harness.measuring.rules import Rules
from edgeforge.errors import UsageError
from edgeforge.measurements.user_runner import UserRunner
from quant.quoted import quoted

PROMPT: Final = 128
OUTPUT: Final = 32
_LARGEST_LENGTH: Final = 1 << 20
_MOST_POINTS: Final = 64


@dataclass(frozen=True)
class BenchOptions:
    """What a user asks of a measurement.

    Attributes:
        devices: their names.
        prompts: lengths of the prompt, in tokens; empty for `PROMPT`, or less in a short context.
        outputs: how many tokens to generate; empty for `OUTPUT`, or less in a short context.
        rules: how to measure.
        threads: of the runtimes; None for their defaults.
        runtime: further options of the runtimes, by name; None as a value means the default.
        instructions: whether to count instructions, where a device does.
        runner: a program of the user's own to run in place of EdgeForge's; None for none.
        fits: whether lengths that a context does not hold are shortened, and not refused.
    """

    devices: tuple[str, ...] = ("host",)
    prompts: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    rules: Rules = field(default_factory=Rules)
    threads: int | None = None
    runtime: Mapping[str, str | None] = field(default_factory=dict)
    instructions: bool = False
    runner: UserRunner | None = None
    fits: bool = False

    def points(self, folders_contexts: Mapping[str, int]) -> list[tuple[int, int]]:
        """The grid: lengths of prompt and output, as they fit every artifact.

        Args:
            folders_contexts: the declared context of each artifact, by its folder.

        Raises:
            UsageError: a length that was asked for does not fit.
        """
        where, context = min(folders_contexts.items(), key=lambda each: each[1])
        prompts = self.prompts or (min(PROMPT, context // 2),)
        found = []
        for prompt in dict.fromkeys(prompts):
            room = context - prompt + 1  # the last token that is generated never runs
            for output in dict.fromkeys(self.outputs or (max(1, min(OUTPUT, room)),)):
                if self.fits:
                    prompt = max(1, min(prompt, context // 2))
                    output = max(1, min(output, context - prompt))
                if prompt + output - 1 > context:
                    raise UsageError(
                        f"a prompt of {prompt} tokens and an output of {output} do not fit the "
                        f"context of {context} of {where}: shorten --prompt or --output"
                    )
                found.append((prompt, output))
        return list(dict.fromkeys(found))


def parse_lengths(text: str | None, name: str) -> tuple[int, ...]:
    """Reads lengths in tokens, separated by commas; empty for None.

    >>> parse_lengths("128,512", "--prompt")
    (128, 512)

    Raises:
        UsageError: one is no length.
    """
    if text is None:
        return ()
    found = []
    for part in text.split(","):
        word = part.strip()
        count = int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else 0
        if not 1 <= count <= _LARGEST_LENGTH:
            raise UsageError(
                f"{name} has {quoted(part)}, which is no number of tokens: write lengths like 128 "
                f"or 128,512"
            )
        found.append(count)
    if len(set(found)) > _MOST_POINTS:
        raise UsageError(f"{name} has {len(set(found))} lengths: at most {_MOST_POINTS} are taken")
    return tuple(dict.fromkeys(found))


def lengths(given: int | Sequence[int] | None, name: str) -> tuple[int, ...]:
    """Reads lengths that were given as numbers, as `parse_lengths` reads texts."""
    if given is None:
        return ()
    return parse_lengths(",".join(map(str, [given] if isinstance(given, int) else given)), name)


def parse_devices(texts: Sequence[str]) -> tuple[str, ...]:
    """Reads devices' names, given one by one or separated by commas; ``host`` where none is given.

    >>> parse_devices(["host,arm64:max", "host"]), parse_devices([])
    (('host', 'arm64:max'), ('host',))

    Raises:
        UsageError: a name is empty.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    if not all(names):
        raise UsageError(
            f"--device has an empty name in {quoted(','.join(texts))}: `edgeforge devices` lists "
            f"them"
        )
    return tuple(dict.fromkeys(names)) or ("host",)
