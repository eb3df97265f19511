"""Text in, text out, on an artifact: what ``edgeforge run`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.generation.sampling import Generation, Sampling
from edgeforge.tokenizer import Tokenizer, stream_text
from exporters.manifest import Manifest


@dataclass(frozen=True)
class Generated:
    """A continued text and what it cost.

    Attributes:
        text: the continuation.
        tokens: its token ids.
        prompt_tokens: length of the prompt.
        load_seconds: from opening the files to a model that can run.
        first_token_seconds: from there to the first token.
        decode_tokens_per_second: after the first one.
        stopped: ``stop``, ``limit`` or ``context``.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    load_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float
    stopped: str

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self)

    def summary(self) -> str:
        """One line on speed and why it ended."""
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
    emit: Callable[[str], None] | None = None,
) -> Generated:
    """Continues a prompt.

    Args:
        folder: the artifact.
        prompt: text.
        max_tokens: how many tokens at most.
        temperature: 0 for greedy.
        top_p: share of probability to draw from.
        seed: of the draws.
        threads: for the runtime.
        emit: called with each piece of text as it comes.

    Raises:
        CheckpointError: the artifact has no tokenizer.
        UsageError: the prompt does not fit the context.
        DeviceError: the runtime failed.
    """
    from device_harness.registry import open_session

    sampling = Sampling(temperature, top_p, seed)
    sampling.check()
    manifest = Manifest.read(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json", str(folder))
    tokens = prompt_tokens(tokenizer, prompt, manifest)
    if len(tokens) >= manifest.context:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, which leaves no room in the artifact's context "
            f"of {manifest.context}"
        )
    given: list[int] = []
    pieces = []
    with open_session(folder, manifest, threads) as session:
        run = Generation(
            session=session,
            prompt=tokens,
            limit=max_tokens,
            stop=frozenset(manifest.model.eos),
            sampling=sampling,
        )

        def kept() -> Iterator[int]:
            for token in run:
                given.append(token)
                yield token

        for piece in stream_text(tokenizer, kept()):
            pieces.append(piece)
            if emit is not None:
                emit(piece)
    return Generated(
        "".join(pieces),
        tuple(given),
        len(tokens),
        run.load_seconds,
        run.prompt_seconds,
        run.decode_tokens_per_second,
        run.stopped,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str, manifest: Manifest) -> list[int]:
    """A prompt's tokens, begun with the model's ``bos`` if it has one.

    Raises:
        UsageError: no token at all, text that is not UTF-8, or another model's tokenizer.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text") from None
    tokens = tokenizer.encode(prompt)
    bos = manifest.model.bos
    if bos is not None and tokens[:1] != [bos]:
        tokens = [bos, *tokens]
    if not tokens:
        raise UsageError("the prompt is empty and the model has no token that begins a text")
    vocab_size = manifest.model.vocab_size
    if max(tokens) >= vocab_size:
        raise UsageError(
            f"the tokenizer gives token {max(tokens)}, but the model has {vocab_size}: it is "
            f"another model's; export again with --tokenizer PATH"
        )
    return tokens
