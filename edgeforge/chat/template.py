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
_TOKENS: Final = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)

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
        values: Mapping[str, object] | None = None,
    ) -> list[str]:
        """Returns the text of each conversation, special tokens included.

        The template runs in a process of its own, with bounds on memory and time.

        Args:
            conversations: the messages of each.
            answer_next: whether the text ends where the assistant's next answer begins.
            today: the date that templates which ask for it are told, such as ``2026-01-31``, for a
                text that is the same on every day; None for the real date.
            values: further names for the template, such as ``enable_thinking``; None for none.

        Raises:
            CheckpointError: the template cannot render them; the message says why.
        """
        library = find_spec("jinja2")
        packages = "" if library is None else str(Path(str(library.origin)).parents[1])
        request = {
            "template": self.text,
            "conversations": [[dict(message) for message in each] for each in conversations],
            "names": {**self.tokens, **(values or {}), "add_generation_prompt": answer_next},
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

    A ``chat_template.jinja`` goes before what ``tokenizer_config.json`` holds, as in transformers,
    and a processor's ``chat_template.json`` comes last. Of several named templates it is the one
    named ``default``.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = _read(files, "tokenizer_config.json")
    tokens = _tokens(files, config)
    own = files.get("chat_template.jinja")
    if own is not None:
        return template_of(own, tokens)
    for name, content in (
        ("tokenizer_config.json", config),
        ("chat_template.json", _read(files, "chat_template.json")),
    ):
        text = _default(content.get("chat_template"))
        if text:
            return ChatTemplate(files[name], text, tokens)
    return None


def special_tokens(files: Mapping[str, Path]) -> dict[str, str]:
    """Returns the special tokens' texts by the names that templates use.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    return _tokens(files, _read(files, "tokenizer_config.json"))


def template_of(file: Path, tokens: Mapping[str, str]) -> ChatTemplate:
    """Returns the template that is the whole content of a file.

    Raises:
        CheckpointError: the file cannot be read or is not UTF-8.
    """
    content = read_small_file(file, MAX_INDEX_BYTES)
    try:
        return ChatTemplate(file, content.decode("utf-8"), tokens)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 ({error})") from None


def _read(files: Mapping[str, Path], name: str) -> Mapping[str, object]:
    path = files.get(name)
    if path is None:
        return {}
    return parse_object(read_small_file(path, MAX_INDEX_BYTES), str(path), strict=False)


def _default(found: object) -> str:
    """The template of a file's entry: a text, or a list or an object of texts by name."""
    if isinstance(found, list):
        rows = [row for row in found if isinstance(row, dict)]
        found = {row.get("name"): row.get("template") for row in rows}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else ""


def _tokens(files: Mapping[str, Path], config: Mapping[str, object]) -> dict[str, str]:
    # As in transformers: the older file counts where the configuration lists no added tokens.
    older = {} if "added_tokens_decoder" in config else _read(files, "special_tokens_map.json")
    whole = {**config, **older}
    return {name: _token(whole[name]) for name in _TOKENS if whole.get(name) is not None}


def _token(value: object) -> str:
    """The text of a special token, which files hold as such or in an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
