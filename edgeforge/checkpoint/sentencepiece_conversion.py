"""Makes a ``tokenizer.json`` of a SentencePiece model, in a process of its own that has bounds.

`edgeforge.checkpoint.sentencepiece_model` runs `main` with the arguments PACKAGES BYTES SECONDS and
a request on stdin. The answer on stdout is JSON: ``{"tokenizer": "..."}`` or
``{"refused": "why"}``. transformers reads the model, and SentencePiece itself says whether what
was made gives its tokens.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

from edgeforge.tokenizer_trial import limit

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE: Final = "▁"
_FLAGS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")
_UNIGRAM, _BPE = 1, 2
# Texts on which both must give the same tokens.
_PROBES: Final = (
    "The function returns a list of 1234 items, isn't it?",
    "Größe, naïve café, ÉCOLE, мир, 漢字と日本語, \U0001f642\U0001f469\u200d\U0001f4bb!",
    "two  spaces,   three;\ttabs\nlines\n\n  indented\r\n",
    "x = {'a': [1.5, -2], \"b\": None}  # <comment> & more",
    "a",
    " begins with a space",
    "ends with spaces  ",
)


class Refused(Exception):
    """The model cannot be converted; the message says why."""


def main() -> None:
    """Converts the model that the request on stdin names."""
    packages, memory, seconds = sys.argv[1:]
    request = json.loads(sys.stdin.buffer.read())
    limit(int(memory), int(seconds))
    sys.path.append(packages)
    try:
        answer = {"tokenizer": converted(**request).to_str()}
    except MemoryError:
        answer = {"refused": f"it takes more than {int(memory) >> 20} MiB of memory"}
    except Refused as error:
        answer = {"refused": str(error)}
    except BaseException as error:  # whatever the libraries make of a damaged file
        answer = {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def converted(file: str, config: dict[str, Any], added: dict[str, dict[str, Any]]) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model.

    Args:
        file: the model.
        config: the content of ``tokenizer_config.json``, or an empty object.
        added: the tokens that are added to the model's, by their ids.

    Raises:
        Refused: it is no such model, or has a setting that ``tokenizer.json`` has no form for.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=file)
    except (RuntimeError, OSError):
        raise Refused("it is no SentencePiece model") from None
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    reader = SentencePieceExtractor(file)
    spec, training = reader.proto.normalizer_spec, reader.proto.trainer_spec
    if training.model_type not in (_UNIGRAM, _BPE):
        raise Refused("it is neither a BPE nor a Unigram model")
    if training.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise Refused("it writes spaces in a form that tokenizer.json does not have")
    tokenizer = _model(reader, training)
    is_first = spec.add_dummy_prefix and config.get("legacy") is False
    _put_spaces(tokenizer, spec, is_first)
    _decode(tokenizer, training.byte_fallback, spec.add_dummy_prefix)
    _hold(tokenizer, pieces, is_first)  # before tokens that SentencePiece does not know are added
    _add(tokenizer, reader.extract(None)["additional_special_tokens"], added)
    _begin_and_end(tokenizer, pieces, config)
    return tokenizer


def _model(reader: Any, training: Any) -> Tokenizer:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, Unigram

    found = reader.extract(None)
    if training.model_type == _UNIGRAM:
        model = Unigram(found["vocab"], training.unk_id, training.byte_fallback)
        return Tokenizer(model)
    return Tokenizer(
        BPE(
            vocab=found["vocab"],
            merges=found["merges"],
            unk_token=training.unk_piece,
            fuse_unk=True,
            byte_fallback=training.byte_fallback,
        )
    )


def _put_spaces(tokenizer: Tokenizer, spec: Any, is_first: bool) -> None:
    """Normalizes text and writes its spaces as the model's pieces have them."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if is_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first", split=False
        )
    else:
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(_SPACE))
        steps.append(normalizers.Replace(" ", _SPACE))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)


def _decode(tokenizer: Tokenizer, has_bytes: bool, has_prefix: bool) -> None:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(_SPACE, " ")]
    if has_bytes:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)


def _hold(tokenizer: Tokenizer, pieces: Any, is_first: bool) -> None:
    """Refuses a tokenizer that gives other tokens than SentencePiece."""
    for text in _PROBES:
        if is_first and text.startswith(" "):
            continue  # `first` puts no second space there, as in transformers
        if tokenizer.encode(text).ids != pieces.encode(text):
            raise Refused(
                f"what transformers makes of it gives other tokens than SentencePiece for {text!r}"
            )


def _add(tokenizer: Tokenizer, own: list[Any], added: dict[str, dict[str, Any]]) -> None:
    from tokenizers import AddedToken

    for token in own:
        tokenizer.add_tokens([token])
    for number, row in sorted(added.items(), key=lambda item: int(item[0])):
        flags = {name: bool(row[name]) for name in _FLAGS if name in row}
        tokenizer.add_tokens([AddedToken(row["content"], **flags)])
        found = tokenizer.token_to_id(row["content"])
        if found != int(number):
            raise Refused(
                f"the added token {row['content']!r} has the id {number}, where {found} is next"
            )


def _begin_and_end(tokenizer: Tokenizer, pieces: Any, config: dict[str, Any]) -> None:
    """Puts tokens around a text as the configuration says: by default a begin token, as Llama."""
    from tokenizers.processors import TemplateProcessing

    begins = config.get("add_bos_token", True) and pieces.bos_id() >= 0
    ends = config.get("add_eos_token", False) and pieces.eos_id() >= 0
    ids = {
        pieces.id_to_piece(number): number
        for number, is_used in ((pieces.bos_id(), begins), (pieces.eos_id(), ends))
        if is_used
    }
    front = f"{pieces.id_to_piece(pieces.bos_id())}:0 " if begins else ""
    back = f" {pieces.id_to_piece(pieces.eos_id())}:0" if ends else ""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{front}$A:0{back}",
        pair=f"{front}$A:0{back} {front.replace(':0', ':1')}$B:1{back.replace(':0', ':1')}",
        special_tokens=list(ids.items()),
    )
