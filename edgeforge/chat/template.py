"""The chat template of a checkpoint, and conversations rendered with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from device_harness.child_process import python_command, python_environment
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError

# What rendering may take. Real templates have at most some 20 KB and take milliseconds.
_BYTES, _SECONDS, _WAIT = 512 << 20, 20, 60
# Names that templates use, as tokenizer_config.json has them.
_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")

Message = Mapping[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants conversations written.

    Attributes:
        source: the file that holds the template.
        text: the template, in Jinja.
        tokens: special tokens' texts by the names that templates use, such as ``bos_token``.
    """

    source: Path
    text: str = field(repr=False)
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        answer_next: bool = False,
        today: str | None = None,
    ) -> list[str]:
        """Returns the text of each conversation, special tokens included.

        The template runs in a process of its own, with bounds on memory and time.

        Args:
            conversations: the messages of each.
            answer_next: whether the text ends where the assistant's next answer begins.
            today: the date that templates which ask for it are told, such as ``2026-01-31``, for a
                text that is the same on every day; None for the real date.

        Raises:
            CheckpointError: the template cannot render them; the message says why.
        """
        library = find_spec("jinja2")
        packages = "" if library is None else str(Path(str(library.origin)).parents[1])
        request = {
            "template": self.text,
            "conversations": [[dict(message) for message in each] for each in conversations],
            "names": {**self.tokens, "add_generation_prompt": answer_next},
            "today": today,
        }
        try:
            done = subprocess.run(
                python_command("edgeforge.chat.rendering", packages, str(_BYTES), str(_SECONDS)),
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=_WAIT,
                env=python_environment(),
            )
            answer = json.loads(done.stdout) if done.returncode == 0 else {}
        except subprocess.TimeoutExpired:
            answer = {}
        if "texts" not in answer:
            why = answer.get("refused", f"it does not end within {_SECONDS} seconds")
            raise CheckpointError(f"the chat template in {self.source} cannot be used: {why}")
        return list(answer["texts"])


def find_template(files: Mapping[str, Path]) -> ChatTemplate | None:
    """Returns a checkpoint's chat template, or None where it has none.

    A ``chat_template.jinja`` goes before what ``tokenizer_config.json`` holds, as in transformers.
    Of several named templates it is the one named ``default``.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    config: Mapping[str, object] = {}
    path = files.get("tokenizer_config.json")
    if path is not None:
        content = read_small_file(path, MAX_INDEX_BYTES)
        config = parse_object(content, str(path), strict=False)
    tokens = {name: _token(config[name]) for name in _TOKENS if config.get(name) is not None}
    own = files.get("chat_template.jinja")
    if own is not None:
        content = read_small_file(own, MAX_INDEX_BYTES)
        try:
            return ChatTemplate(own, content.decode("utf-8"), tokens)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{own} is not UTF-8 ({error})") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        rows = [row for row in found if isinstance(row, dict)]
        found = next((row.get("template") for row in rows if row.get("name") == "default"), None)
    if path is None or not isinstance(found, str) or not found:
        return None
    return ChatTemplate(path, found, tokens)


def _token(value: object) -> str:
    """The text of a special token, which files hold as such or in an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
