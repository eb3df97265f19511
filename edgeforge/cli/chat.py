"""The command `edgeforge chat`: a conversation at a terminal, or one message a line of a pipe."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Final

from edgeforge.cli import adapter_options, chat_options, options
from edgeforge.cli.printable import answer, printable

if TYPE_CHECKING:
    from edgeforge.generation.conversation import Conversation

_LONGEST_LINE: Final = 16 << 20  # bytes
_BLOCK: Final = '"""'
_HELP: Final = f"""\
/reset          begin a new conversation; the system prompt stays
/system TEXT    begin a new conversation with another system prompt, or with none
/retry          ask for the last answer again
/undo           forget the last message and its answer
/help           show this
/exit           leave, as Ctrl-D does
{_BLOCK}             begin and end a message of several lines
Ctrl-C          end the answer that is being written"""


def chat(
    artifact: options.Artifact,
    system: chat_options.System = None,
    chat_template: chat_options.Template = None,
    template_value: chat_options.Values = None,
    max_tokens: chat_options.MaxTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.DrawSeed = 0,
    threads: options.Threads = None,
    device: options.RunDevice = "host",
    adapter: adapter_options.RunAdapter = None,
    json: chat_options.JsonLines = False,
) -> None:
    """Talk with an artifact: at a terminal, or with one message a line from a pipe."""
    from edgeforge.cli.progress import Reporter
    from edgeforge.generation.conversation import ChatOptions, open_conversation
    from edgeforge.generation.sampling import Sampling

    asked = ChatOptions(
        system,
        chat_template,
        chat_options.template_values(template_value),
        max_tokens,
        Sampling(temperature, top_p, seed),
    )
    switched = adapter_options.only_one(adapter)
    with open_conversation(
        artifact, asked, threads=threads, device=device, adapter=switched, progress=Reporter()
    ) as conversation:
        if sys.stdin.isatty():
            _at_a_terminal(conversation, json)
        else:
            _from_a_pipe(conversation, json)


def emit(piece: str) -> None:
    """Prints a piece of an answer: a pipe gets it as it is, a terminal must not obey it."""
    sys.stdout.write(answer(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _from_a_pipe(conversation: Conversation, json: bool) -> None:
    from edgeforge.errors import UsageError

    count = 0
    for line in _lines():
        if not line.strip():
            continue
        count += 1
        if not _command(conversation, line, lambda message: _say(conversation, message, json)):
            _say(conversation, line, json)
    if not count:
        raise UsageError("there is no message: give one a line on stdin, or run it at a terminal")


def _at_a_terminal(conversation: Conversation, json: bool) -> None:
    from edgeforge.cli.exits import one_line
    from edgeforge.errors import CheckpointError, UsageError

    with suppress(ImportError):  # editing and history of lines, where Python has it
        import readline  # noqa: F401

    print("Type a message; /help lists what else there is.", file=sys.stderr)

    def say(message: str) -> None:
        with _ending_answers() as is_stopped:
            try:
                _say(conversation, message, json, is_stopped)
            except (UsageError, CheckpointError) as error:
                # The conversation is as it was; who talks can go on.
                print(f"edgeforge: {one_line(str(error))}", file=sys.stderr)

    while True:
        try:
            line = _typed()
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip() in ("/exit", "/quit", "/bye"):
            return
        if line.strip() in ("/help", "/?"):
            print(_HELP, file=sys.stderr)
        elif not line.strip() or _command(conversation, line, say):
            continue
        elif re.fullmatch(r"/\w+", line.strip()):
            print(f"there is no {line.strip()}; /help lists what there is", file=sys.stderr)
        else:
            say(line)


def _command(conversation: Conversation, line: str, say: Callable[[str], None]) -> bool:
    """Does what a line commands; returns whether it is a command."""
    word, _, rest = line.strip().partition(" ")
    if word == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
    elif rest or word not in ("/reset", "/clear", "/retry", "/undo"):
        return False
    elif word in ("/reset", "/clear"):
        conversation.reset()
    else:
        message = conversation.undo()
        if message is None:
            print("nothing was said yet", file=sys.stderr)
        elif word == "/retry":
            say(message)
    return True


def _say(
    conversation: Conversation,
    message: str,
    json: bool,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    result = conversation.say(message, None if json else emit, is_stopped)
    if json:
        print(_json_line(result.to_json()), flush=True)
        return
    print(flush=True)
    for note in result.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(printable(result.summary()), file=sys.stderr)


def _json_line(value: object) -> str:
    from json import dumps

    return dumps(value, allow_nan=False)  # in ASCII: nothing in it commands a terminal


def _lines() -> Iterator[str]:
    """The lines of stdin, without their ends.

    Raises:
        UsageError: a line is not UTF-8 text or too long.
    """
    from edgeforge.errors import UsageError

    number = 0
    while line := sys.stdin.buffer.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise UsageError(f"line {number} has more than {_LONGEST_LINE >> 20} MiB")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} is not UTF-8 text ({error.reason} at byte {error.start}): convert "
                f"it to UTF-8"
            ) from None
        yield text.rstrip("\r\n")


def _typed() -> str:
    """A message that is typed: a line, or the lines between two marks.

    Raises:
        EOFError: nothing more comes.
    """
    line = input(">>> ")
    if not line.lstrip().startswith(_BLOCK):
        return line
    lines = [line.lstrip().removeprefix(_BLOCK)]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return "\n".join(lines).strip("\n")


@contextmanager
def _ending_answers() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C end the answer, and a second one the command, while the block lasts.

    An answer ends between two tokens, so that what talks with the runtime is never cut off.
    """
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        if asked or number != signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
