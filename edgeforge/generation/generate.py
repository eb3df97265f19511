"""Continues a text with an artifact, as ``edgeforge run`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.generation.drafters import Speculation, open_drafter
from edgeforge.generation.sampling import Generation, Sampling
from edgeforge.generation.speculation import Speculated, SpeculativeGeneration
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.tokenizer import Tokenizer, stream_text
from exporters.manifest import Manifest


@dataclass(frozen=True)
class Generated:
    """A continued text and the time that it took.

    Attributes:
        text: the continuation.
        tokens: token ids of the continuation.
        prompt_tokens: number of the prompt's tokens.
        load_seconds: seconds from opening the files until the model can run.
        first_token_seconds: seconds from then to the first token.
        decode_tokens_per_second: tokens per second after the first token.
        stopped: ``stop`` (the model ended the text), ``limit`` or ``context``.
        notes: what was not done as one might expect, one sentence each.
        speculation: what speculation brought; None where there was none.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    load_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float
    stopped: str
    notes: tuple[str, ...] = ()
    speculation: Speculated | None = None

    def to_json(self) -> dict[str, object]:
        """Returns the fields as ``--json`` prints them."""
        return asdict(self)

    def summary(self) -> str:
        """Returns one line about the speed and why the text ended."""
        ends = {
            "stop": "the model ended the text",
            "limit": "as many as asked for",
            "context": "the context is full",
        }
        return (
            f"[loaded in {self.load_seconds:.2f} s; {self.prompt_tokens} prompt tokens, first "
            f"token after {self.first_token_seconds * 1e3:.0f} ms; {len(self.tokens)} tokens at "
            f"{self.decode_tokens_per_second:.1f} tokens/s; {ends[self.stopped]}]"
        )


def generate(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    device: str = "host",
    speculation: Speculation | None = None,
    adapter: str | None = None,
    emit: Callable[[str], None] | None = None,
    progress: Progress = no_progress,
) -> Generated:
    """Continues a prompt.

    Args:
        folder: the artifact's folder.
        prompt: the text to continue.
        max_tokens: the largest number of tokens to generate.
        temperature: divisor of the logits; 0 always takes the likeliest token.
        top_p: draw only from the likeliest tokens whose probabilities add up to this.
        seed: seed of the draws.
        threads: threads for the runtime; None for the runtime's default.
        device: where to run, as ``--device`` takes it.
        speculation: who proposes tokens; None for one token a call.
        adapter: name of an adapter of the artifact, to be switched on; None for none.
        emit: called with each piece of text as it comes.
        progress: told how much of what is sent to the device has arrived.

    Raises:
        CheckpointError: the artifact has no tokenizer.
        UsageError: the prompt does not fit the context, a value of sampling is out of range, or the
            artifact cannot run drafts.
        LogitsNotFiniteError: the runtime gave NaN or infinite logits.
        DeviceError: the device cannot be reached, or the runtime failed.
    """
    from device_harness.device_session import open_on
    from device_harness.devices.registry import open_device

    sampling = Sampling(temperature, top_p, seed)
    sampling.check()
    manifest = Manifest.read(folder)
    options = {} if adapter is None else {"adapter": manifest.require_adapter(adapter, str(folder))}
    draft = 0 if speculation is None else speculation.tokens(folder, manifest)
    tokenizer = Tokenizer(folder / "tokenizer.json", str(folder), text=prompt)
    tokens, notes = prompt_tokens(tokenizer, prompt, manifest)
    if len(tokens) >= manifest.context:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, which leaves no room in the artifact's context "
            f"of {manifest.context}: give a shorter prompt, or export with a longer --context"
        )
    given: list[int] = []
    pieces = []
    with (
        open_device(device, progress=progress) as where,
        open_drafter(speculation, manifest, where, threads)
        if speculation is not None
        else nullcontext() as drafter,
        open_on(where, folder, manifest, threads, options) as session,
    ):
        stop = frozenset(manifest.model.eos)
        if drafter is None:
            run = Generation(session, tokens, max_tokens, stop, sampling)
        else:
            run = SpeculativeGeneration(
                session, tokens, max_tokens, stop, sampling, drafter=drafter, draft=draft
            )
            run.fixed = speculation is not None and speculation.draft is not None

        def kept() -> Iterator[int]:
            for token in run:
                given.append(token)
                yield token

        for piece in stream_text(tokenizer, kept()):
            pieces.append(piece)
            if emit is not None:
                emit(piece)
        brought = run.result() if isinstance(run, SpeculativeGeneration) else None
    return Generated(
        "".join(pieces),
        tuple(given),
        len(tokens),
        run.load_seconds,
        run.prompt_seconds,
        run.decode_tokens_per_second,
        run.stopped,
        notes,
        brought,
    )


def prompt_tokens(
    tokenizer: Tokenizer, prompt: str, manifest: Manifest
) -> tuple[list[int], tuple[str, ...]]:
    """Returns a prompt's tokens as its tokenizer gives them, and notes on what differs.

    The config's ``bos`` is not added: the tokenizer knows whether the model was trained with it.
    Only an empty prompt begins with it, as in transformers, where the tokenizer gives no token.

    Raises:
        UsageError: the prompt has no token or is not UTF-8, or the tokenizer is another model's.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text") from None
    tokens, is_double = tokenizer.encode_prompt(prompt)
    notes = (
        "the prompt begins with the token that the tokenizer puts in front of every text, so it "
        "was not put there once more",
    )
    if not tokens and manifest.model.bos is not None:
        tokens = [manifest.model.bos]
    if not tokens:
        raise UsageError("the prompt is empty and the model has no token that begins a text")
    vocab_size = manifest.model.vocab_size
    if max(tokens) >= vocab_size:
        raise UsageError(
            f"the tokenizer gives token {max(tokens)}, but the model has {vocab_size} tokens: it "
            f"is another model's; export again with --tokenizer PATH"
        )
    return tokens, notes if is_double else ()
