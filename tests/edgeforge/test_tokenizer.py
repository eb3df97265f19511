"""Text to tokens, tokens to a stream of text, files of text, blocks."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.synth.synthesise import write_byte_tokenizer
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks, stream_text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    """One token a byte: characters come in up to four pieces."""
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return Tokenizer(folder / "tokenizer.json", "here")


SPECIAL = "<special>"


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> Tokenizer:
    """As Llama 2's: words begin with a mark for the space, which the first word drops."""
    words = ["\u2581", "\u2581the", "\u2581cat", "s", "\n", ".", "\u2581sat", "é"]
    names = ["<unk>", *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([SPECIAL])
    file = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    tokenizer.save(str(file))
    return Tokenizer(file, "here")


@given(st.text(max_size=120))
@settings(max_examples=150, deadline=None)
def test_streamed_bytes_join_to_the_text_and_never_split_a_character(byte_level, text):
    tokens = byte_level.encode(text, special=False)
    assert tokens == list(text.encode())
    pieces = list(stream_text(byte_level, iter(tokens)))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=120))
@settings(max_examples=150, deadline=None)
def test_streamed_bytes_of_any_kind_join_to_what_they_decode_to(byte_level, tokens):
    assert "".join(stream_text(byte_level, iter(tokens))) == bytes(tokens).decode(errors="replace")


FIRST_BYTE = 9
PIECES = st.one_of(
    st.integers(1, FIRST_BYTE - 1).map(lambda token: [token]),
    st.just([FIRST_BYTE + 256]),  # the special token, which shows nothing
    st.characters(codec="utf-8").map(lambda c: [FIRST_BYTE + byte for byte in c.encode()]),
)


@given(st.lists(PIECES, max_size=60))
@settings(max_examples=200, deadline=None)
def test_spaces_that_begin_words_are_kept(llama_like, found):
    tokens = [token for piece in found for token in piece]
    pieces = list(stream_text(llama_like, iter(tokens)))
    assert "".join(pieces) == llama_like.decode(tokens)


def test_a_word_after_a_line_keeps_its_space(llama_like):
    words = {"the": 2, "cat": 3, "line": 5}
    tokens = [words["the"]] * 20 + [words["line"]] + [words["cat"]] * 40
    text = "".join(stream_text(llama_like, iter(tokens)))
    assert text == ("the " * 20).rstrip() + "\n" + " cat" * 40


def test_a_word_after_many_tokens_that_show_nothing_keeps_its_space(llama_like):
    the, special = 2, FIRST_BYTE + 256
    for count in range(14, 40):
        tokens = [the] * 5 + [special] * count + [the] * 3
        assert "".join(stream_text(llama_like, iter(tokens))) == "the the the the the the the the"


def test_characters_in_a_long_run_of_bytes_are_not_split(llama_like):
    text = "a" + "é" * 60
    tokens = [FIRST_BYTE + byte for byte in text.encode()]
    pieces = list(stream_text(llama_like, iter(tokens)))
    assert pieces == list(text)


def test_pieces_come_as_soon_as_they_are_whole(byte_level):
    taken: list[int] = []

    def tokens():
        for byte in "aé€".encode():
            taken.append(byte)
            yield byte

    seen = [(piece, len(taken)) for piece in stream_text(byte_level, tokens())]
    assert seen == [("a", 1), ("é", 3), ("€", 6)]


def test_a_long_text_is_not_decoded_again_and_again(byte_level, monkeypatch):
    longest = 0
    decode = Tokenizer.decode

    def watched(self, tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(Tokenizer, "decode", watched)
    text = "no line ends here " * 100
    tokens = byte_level.encode(text, special=False)
    assert "".join(stream_text(byte_level, iter(tokens))) == text
    assert longest < 64


def test_special_tokens_are_put_around_and_left_out(byte_level):
    assert byte_level.encode("ab") == [256, 97, 98]
    assert byte_level.encode("ab", special=False) == [97, 98]
    assert byte_level.decode([256, 97, 257, 98]) == "ab"
    assert byte_level.size > 257


@pytest.mark.parametrize("file", [None, Path("nowhere.json")])
def test_no_tokenizer_is_refused(file):
    with pytest.raises(CheckpointError, match=r"art has no tokenizer\.json.*--tokenizer PATH"):
        Tokenizer(file, "art")


def test_text_files_are_read_as_utf8(tmp_path):
    file = tmp_path / "größe 漢字.txt"
    file.write_bytes("é漢\n".encode())
    assert read_text(file) == "é漢\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds no text"), (b" \n\t", "holds no text"), (b"caf\xe9 au", "is not UTF-8 text")],
)
def test_files_without_text_are_refused(tmp_path, content, words):
    file = tmp_path / "t.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_text(file)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


@given(
    st.lists(st.integers(0, 9), max_size=50),
    st.integers(3, 12),
    st.sampled_from([[], [99], [98, 99]]),
    st.one_of(st.none(), st.integers(0, 60)),
)
@settings(max_examples=150, deadline=None)
def test_blocks_hold_the_text_in_order(tokens, length, head, limit):
    blocks = split_blocks(tokens, length, head, limit)
    assert all(2 <= len(block) <= length and block[: len(head)] == head for block in blocks)
    joined = [token for block in blocks for token in block[len(head) :]]
    used = tokens[:limit]
    # Without a first token, a single token at the end predicts nothing and is left out.
    assert joined == used[: len(joined)] and len(used) - len(joined) <= (not head)
    assert all(len(block) == length for block in blocks[:-1])


def test_the_byte_tokenizer_is_what_it_says(tmp_path):
    write_byte_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "ByteLevel"
