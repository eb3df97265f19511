"""Opens a tokenizer and encodes a text, in a process of its own that has bounds.

A ``tokenizer.json`` of a stranger can end the process that opens it, or make a short text as long
as the memory. `edgeforge.tokenizer` therefore runs this file as a program first:
``python -P tokenizer_trial.py FILE PACKAGES BYTES SECONDS``, with a text on stdin. PACKAGES is the
folder that has the tokenizers library. It exits with `REFUSED` and prints why, or with 0. It
imports nothing of EdgeForge, so that it takes a tenth of a second.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from typing import Final

REFUSED: Final = 3
_MAX_FILE: Final = 256 << 20
_MAX_GROWTH: Final = 4096  # real normalizers and decoders double a text at most
_MAX_PADDING: Final = 1 << 20  # tokens
_LONGEST_CHARSMAP: Final = 18  # characters that NFKC makes of one
_PROBE: Final = (
    "".join(map(chr, range(32, 127))) + "\n\t  Größe, naïve, 漢字 \U0001f642 12.50 a b c\r\n"
)


class Refused(Exception):
    """The file is no tokenizer that can be used; the message says why."""


def main() -> None:
    """Tries the tokenizer that the command line names."""
    file, packages, memory, seconds = sys.argv[1:]
    text = sys.stdin.buffer.read().decode("utf-8")
    limit(int(memory), int(seconds))
    sys.path.append(packages)
    try:
        check(read(file))
        _use(file, text)
    except MemoryError:
        _refuse(f"opening it takes more than {int(memory) >> 20} MiB of memory")
    except Refused as error:
        _refuse(str(error))


def read(file: str) -> dict[str, object]:
    """Returns the content of a ``tokenizer.json``.

    Raises:
        Refused: it is too large, or is no JSON object.
    """
    try:
        with open(file, "rb") as stream:
            content = stream.read(_MAX_FILE + 1)
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror})") from None
    if len(content) > _MAX_FILE:
        raise Refused(f"it has more than {_MAX_FILE >> 20} MiB")
    start = content[:64].lstrip()
    if not start:
        raise Refused("it is empty")
    if start.startswith(b"\xef\xbb\xbf"):
        raise Refused("it begins with a byte order mark, which JSON must not have")
    if start.startswith(b"<"):
        raise Refused("it is a web page, as a failed download leaves it")
    if start.startswith(b"version https://git-lfs"):
        raise Refused("it is a Git LFS pointer, not the file itself")
    try:
        value = json.loads(content)
    except RecursionError:
        raise Refused("its JSON is nested too deep") from None
    except ValueError as error:
        raise Refused(f"it is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refused(f"it is a JSON {type(value).__name__}, not an object")
    return value


def check(tokenizer: dict[str, object]) -> None:
    """Refuses a tokenizer that makes texts of any length.

    Raises:
        Refused: says which part does it.
    """
    if not isinstance(tokenizer.get("model"), dict):
        raise Refused("it has no model")
    padding = tokenizer.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, dict) else 0
        longest = max(_number(fixed), _number(padding.get("pad_to_multiple_of")))
        if longest > _MAX_PADDING:
            raise Refused(f"it pads every text to {longest} tokens")
    for part in ("normalizer", "decoder"):
        try:
            grown = growth(tokenizer.get(part))
        except RecursionError:
            raise Refused(f"its {part} is nested too deep") from None
        if grown > _MAX_GROWTH:
            raise Refused(f"its {part} can make a text more than {_MAX_GROWTH} times longer")


def growth(step: object) -> float:
    """How many times longer a normalizer or decoder can make a text, at most.

    >>> growth({"type": "Replace", "pattern": {"String": " "}, "content": "_"})
    1.0
    >>> double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    >>> growth({"type": "Sequence", "normalizers": [double] * 40}) == 2**40
    True
    """
    if not isinstance(step, dict):
        return 1.0
    grown = 1.0
    for steps in (step.get("normalizers"), step.get("decoders")):
        for each in steps if isinstance(steps, list) else ():
            grown = min(grown * growth(each), 1e18)
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        grown *= _replaced(step.get("pattern"), len(content))
    elif kind == "Prepend":
        grown *= 1.0 + len(str(step.get("prepend", "")))
    elif kind == "Precompiled":
        grown *= _LONGEST_CHARSMAP
    return grown


def _replaced(pattern: object, length: int) -> float:
    row = pattern if isinstance(pattern, dict) else {}
    string = row.get("String")
    if isinstance(string, str) and string:
        return max(1.0, length / len(string))
    try:
        takes_nothing = re.match(str(row.get("Regex", "")), "") is not None
    except (re.error, RecursionError, OverflowError):
        takes_nothing = True
    return 1.0 + length if takes_nothing else max(1.0, length)


def _use(file: str, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(file)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode(text)
        # A tokenizer that does not know a character of the probe may refuse it, but not panic.
        with suppress(Exception):
            tokenizer.decode(tokenizer.encode(_PROBE).ids)
    except MemoryError:
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise Refused(f"the tokenizers library does not open it ({error})") from None


def limit(memory: int, seconds: int) -> None:
    """Bounds this process's private memory, in bytes, and its time on the processor."""
    import resource

    for kind, limit in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard < 0 else min(limit, hard), hard))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _refuse(why: str) -> None:
    sys.stdout.buffer.write(why.encode("utf-8", "backslashreplace"))
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
