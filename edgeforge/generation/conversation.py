"""Talks with an artifact in turns, as ``edgeforge chat`` and ``edgeforge run --chat`` do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from device_harness.session import Session
from edgeforge.chat.template import ChatTemplate, find_template, special_tokens, template_of
from edgeforge.chat.turn_end import turn_ends
from edgeforge.checkpoint.layout import TOKENIZER_FILES
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.generation.sampling import Generation, Sampling
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.tokenizer import TOKENIZER, Tokenizer, stream_text
from exporters.manifest import Manifest

_ENDS = {
    "stop": "the model ended its answer",
    "limit": "as many as asked for",
    "context": "the context is full",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is held.

    Attributes:
        system: what the model is told before the first message; None for nothing.
        template: a Jinja file to use in place of the artifact's own template; None for its own.
        values: further names for the template, such as ``enable_thinking``.
        max_tokens: the largest number of tokens of an answer; None for what the context has room
            for.
        sampling: how tokens are drawn.
    """

    system: str | None = None
    template: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    """What the model said in a turn, and the time that it took.

    Attributes:
        text: the answer.
        tokens: its token ids.
        prompt_tokens: tokens of the conversation before the answer.
        kept_tokens: how many of them the caches still held, so that they were not run again.
        load_seconds: seconds until the model could run; 0 once it is loaded.
        first_token_seconds: seconds from then to the first token.
        decode_tokens_per_second: tokens per second after the first token.
        stopped: ``stop`` (the model ended its answer), ``limit``, ``context`` or ``interrupted``.
        context: how many tokens the artifact's context has.
        notes: what was not done as one might expect, one sentence each.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    kept_tokens: int
    load_seconds: float
    first_token_seconds: float
    decode_tokens_per_second: float
    stopped: str
    context: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Returns the fields as ``--json`` prints them."""
        return asdict(self)

    def summary(self) -> str:
        """Returns one line about the speed, the room left, and why the answer ended."""
        read = self.prompt_tokens - self.kept_tokens
        loaded = f"loaded in {self.load_seconds:.2f} s; " if self.load_seconds > 0.01 else ""
        kept = f" after {self.kept_tokens} that were kept" if self.kept_tokens else ""
        used = min(self.prompt_tokens + len(self.tokens), self.context)
        return (
            f"[{loaded}{read} tokens read{kept}, first token after "
            f"{self.first_token_seconds * 1e3:.0f} ms; {len(self.tokens)} tokens at "
            f"{self.decode_tokens_per_second:.1f} tokens/s; {_ENDS[self.stopped]}; "
            f"{used} of {self.context} tokens used]"
        )


class Conversation:
    """A conversation with an opened artifact.

    The caches are kept from turn to turn as long as the template writes what was said as it did
    before, and an answer stays the tokens that the model chose, also where the tokenizer would cut
    its text otherwise. Where the template writes it anew, as those do that drop what a model
    thought, what follows is run again, and a note says so; all of the conversation where the
    model carries more than caches from token to token.

    Args:
        session: the artifact in its runtime.
        tokenizer: its tokenizer.
        template: how it wants conversations written.
        manifest: its manifest.
        stop: the tokens that end an answer.
        options: how the conversation is held.

    Attributes:
        messages: what was said, with ``role`` and ``content``.
        system: what the model is told before the first message; None for nothing.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        manifest: Manifest,
        stop: frozenset[int],
        options: ChatOptions,
    ) -> None:
        self._session, self._tokenizer, self._template = session, tokenizer, template
        self._manifest, self._stop, self._options = manifest, stop, options
        self._held: list[int] = []  # the tokens that the session's caches hold
        # All that was said until the end of each turn: its text, "" where that hides a token, and
        # its tokens.
        self._turns: list[tuple[str, list[int]]] = []
        self._goes_on = False  # whether the next message follows what the caches hold
        self.messages: list[dict[str, str]] = []
        self.system = options.system

    def reset(self) -> None:
        """Forgets what was said; the system prompt stays."""
        self.messages.clear()
        self._turns.clear()
        self._goes_on = False

    def undo(self) -> str | None:
        """Forgets the last message and its answer; returns the message, or None where none is."""
        if not self.messages:
            return None
        message = self.messages[-2]["content"]
        del self.messages[-2:], self._turns[-1]
        self._goes_on = False
        return message

    def prompt(self, message: str) -> tuple[str, list[int]]:
        """Returns the text and the tokens that the model would be given for a next message.

        The tokens are those of the template's text, special tokens as the template writes them:
        what the tokenizer adds to other texts is not added, as in transformers.

        Raises:
            CheckpointError: the template refuses the conversation.
            UsageError: the message is not UTF-8 text, the template refuses a system prompt, or the
                tokenizer is another model's.
        """
        try:
            message.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError("the message is not UTF-8 text") from None
        text = self._written([*self.messages, {"role": "user", "content": message}])
        tokens = self._encode(text)
        if not tokens:
            raise CheckpointError(f"the chat template in {self._template.source} writes no text")
        vocab_size = self._manifest.model.vocab_size
        if max(tokens) >= vocab_size:
            raise UsageError(
                f"the tokenizer gives token {max(tokens)}, but the model has {vocab_size} tokens: "
                f"it is another model's; export again with --tokenizer PATH"
            )
        return text, tokens

    def _written(self, said: list[dict[str, str]]) -> str:
        def render(messages: list[dict[str, str]]) -> str:
            values = self._options.values
            return self._template.render([messages], answer_next=True, values=values)[0]

        if self.system is None:
            return render(said)
        try:
            return render([{"role": "system", "content": self.system}, *said])
        except CheckpointError as error:
            render(said)  # refuses what is not the system prompt's fault
            raise UsageError(f"the model takes no system prompt: leave it out ({error})") from None

    def _encode(self, text: str) -> list[int]:
        tokens = self._tokenizer.encode(text, special=False)
        before, said = self._turns[-1] if self._turns else ("", [])
        rest = text[len(before) :]
        if not before or tokens[: len(said)] == said or not text.startswith(before):
            return tokens
        # The model chose other tokens for its answer than the tokenizer does. They stay where what
        # follows them begins with an added token, for only there may a text be cut.
        if not rest.startswith(tuple(self._tokenizer.added_tokens)):
            return tokens
        return [*said, *self._tokenizer.encode(rest, special=False)]

    def _rewound(self, tokens: list[int]) -> int:
        """Takes the caches back to what they share with a conversation; returns how many tokens."""
        same = 0
        for one, other in zip(self._held, tokens[:-1], strict=False):
            if one != other:
                break
            same += 1
        if same < len(self._held):
            if not self._session.can_rewind:
                return 0
            if same:
                self._session.rewind(same)
        return same

    def say(
        self,
        message: str,
        emit: Callable[[str], None] | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Says a message and returns the model's answer; both become part of the conversation.

        Args:
            message: what the user says.
            emit: called with each piece of the answer as it comes, never half a character.
            is_stopped: asked after each token whether to end the answer there.

        Raises:
            CheckpointError: the template refuses the conversation.
            UsageError: the conversation does not fit the context; it stays as it was.
            LogitsNotFiniteError: the runtime gave NaN or infinite logits.
            DeviceError: the runtime failed.
        """
        (text, tokens), context = self.prompt(message), self._manifest.context
        if len(tokens) >= context:
            raise UsageError(
                f"with this message the conversation has {len(tokens)} tokens, which leaves no "
                f"room in the artifact's context of {context}: shorten it, begin a new "
                f"conversation, or export with a longer --context"
            )
        held = self._rewound(tokens)
        is_kept = held == len(self._held)
        again = f"all but the first {held} of its" if held else "all of its"
        notes = (
            f"the template writes the conversation otherwise than before, so {again} "
            f"{len(tokens)} tokens were run again",
        )
        run = Generation(
            session=self._session,
            prompt=tokens,
            limit=context if self._options.max_tokens is None else self._options.max_tokens,
            stop=self._stop,
            sampling=self._options.sampling,
            held=held,
        )
        goes_on, self._held = self._goes_on, []
        given: list[int] = []
        pieces = []

        def kept() -> Iterator[int]:
            for token in run:
                given.append(token)
                yield token
                if is_stopped():
                    run.stopped = "interrupted"
                    return

        for piece in stream_text(self._tokenizer, kept()):
            pieces.append(piece)
            if emit is not None:
                emit(piece)
        # Only now: after an error nobody knows what the caches hold.
        self._held = run.fed
        said = "".join(pieces)
        # What the text does not show of the answer is not part of the conversation.
        is_shown = self._tokenizer.special_tokens.isdisjoint(given)
        self._turns.append((text + said if is_shown else "", [*tokens, *given]))
        self._goes_on = True
        self.messages += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": said},
        ]
        return Answer(
            said,
            tuple(given),
            len(tokens),
            run.held,
            run.load_seconds,
            run.prompt_seconds,
            run.decode_tokens_per_second,
            run.stopped,
            context,
            notes if goes_on and not is_kept else (),
        )


@contextmanager
def open_conversation(
    folder: Path,
    options: ChatOptions,
    *,
    threads: int | None = None,
    device: str = "host",
    adapter: str | None = None,
    progress: Progress = no_progress,
) -> Iterator[Conversation]:
    """Opens an artifact to talk with, in any runtime and on any device.

    Args:
        folder: the artifact's folder.
        options: how the conversation is held.
        threads: threads for the runtime; None for the runtime's default.
        device: where to run, as ``--device`` takes it.
        adapter: name of an adapter of the artifact, to be switched on; None for none.
        progress: told how much of what is sent to the device has arrived.

    Raises:
        CheckpointError: the artifact has no tokenizer, or its template cannot be read.
        UsageError: the artifact has no chat template, or a value of sampling is out of range.
        DeviceError: the device cannot be reached, or the runtime failed.
    """
    from device_harness.device_session import open_on
    from device_harness.devices.registry import open_device

    options.sampling.check()
    manifest = Manifest.read(folder)
    given = {} if adapter is None else {"adapter": manifest.require_adapter(adapter, str(folder))}
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    tokenizer = Tokenizer(files.get(TOKENIZER), str(folder))
    template = _template(folder, files, options.template)
    stop = frozenset((*manifest.model.eos, *turn_ends(files, template)))
    with (
        open_device(device, progress=progress) as where,
        open_on(where, folder, manifest, threads, given) as session,
    ):
        yield Conversation(session, tokenizer, template, manifest, stop, options)


def _template(folder: Path, files: Mapping[str, Path], own: Path | None) -> ChatTemplate:
    """The template that the user named, or else the artifact's."""
    if own is not None:
        if not own.is_file():
            raise UsageError(f"--chat-template {own} is not a file: name a Jinja template")
        return template_of(own, special_tokens(files))
    found = find_template(files)
    if found is None:
        raise UsageError(
            f"{folder} has no chat template, as models have that only continue texts: use "
            f"`edgeforge run` to continue a text, or give the template of its family with "
            f"--chat-template FILE"
        )
    return found
