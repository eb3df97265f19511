"""`tokenizer.json` of RWKV's World vocabulary, against a search for the longest token."""

import json
import random
import time

import pytest

from edgeforge.checkpoint.world_vocabulary import (
    END_OF_TEXT,
    NUMBERED,
    PLAIN,
    find_vocabulary,
    tokenizer_of_vocabulary,
)
from edgeforge.errors import CheckpointError
from edgeforge.model.model import open_model
from edgeforge.tokenizer import Tokenizer
from tests.edgeforge.families.test_rwkv import FINCH
from tests.oracles import rwkv_numpy

# Literals as the file has them: text, text with an apostrophe, and bytes that are no whole text.
WORDS = [
    "ab", "abcd", "abcdefgh", " the", "\n\n", "don't", 'say "', "\\\\", "[^a-z]&&", "-]", "é",
    "漢字", "漢", "\U0001f642", b"\xe6\xbc", b"\xe5\xad\x97\xe6", b"\xff\xfe", "  " * 8, "a\x00b",
]  # fmt: skip


def lines() -> list[str]:
    single = [chr(byte) if byte < 128 else bytes([byte]) for byte in range(256)]
    found = []
    for number, word in enumerate([*single, *WORDS], 1):
        size = len(word if isinstance(word, bytes) else word.encode())
        found.append(f"{number} {word!r} {size}")
    return found


def save(folder, content, name=NUMBERED, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name}
    files[name].write_text(content, encoding="utf-8")
    if config is not None:
        files["tokenizer_config.json"] = folder / "tokenizer_config.json"
        files["tokenizer_config.json"].write_text(json.dumps(config))
    return files


def opened(files):
    return Tokenizer(tokenizer_of_vocabulary(files, find_vocabulary(files)), "here")


def longest(text: bytes, tokens: dict[bytes, int]) -> list[int]:
    """The ids of the longest tokens, one after the other."""
    found = []
    while text:
        token = max((each for each in tokens if text.startswith(each)), key=len)
        found.append(tokens[token])
        text = text[len(token) :]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return opened(save(tmp_path_factory.mktemp("world"), "\n".join(lines()) + "\n"))


TOKENS = {bytes([byte]): byte + 1 for byte in range(256)} | {
    word if isinstance(word, bytes) else word.encode(): 257 + at for at, word in enumerate(WORDS)
}


def test_texts_get_the_longest_token_at_each_place(world):
    pick = random.Random(0)
    whole = [word for word in WORDS if isinstance(word, str)]
    for _ in range(60):
        parts = pick.choices([*whole, *"abcdefgh 'é漢字\t\n", "\U0001f469\u200d"], k=40)
        text = "".join(parts)
        ids = world.encode(text)
        assert ids == longest(text.encode(), TOKENS)
        assert world.decode(ids) == text


def test_each_token_is_decoded_to_its_bytes(world):
    for token, number in TOKENS.items():
        assert world.decode([number]) == token.decode(errors="replace")
    assert world.decode([257 + WORDS.index(b"\xe6\xbc"), 0xA2 + 1]) == "漢"  # in two halves


def test_long_texts_take_time_in_proportion(world):
    for text in ("abcdefgh", " ", "漢", "x"):
        before = time.process_time()
        assert world.decode(world.encode(text * 50_000)) == text * 50_000
        assert time.process_time() - before < 10  # in proportion to the square, it takes hours


def test_token_0_ends_a_text_and_has_the_name_that_the_folder_states(world, tmp_path):
    assert world.encode(f"ab{END_OF_TEXT}ab") == [257, 0, 257]
    assert world.decode([257, 0]) == "ab" and world.added() == ((), ())
    content = "\n".join(lines())
    named = opened(save(tmp_path / "a", content, config={"eos_token": "<s>"}))
    assert named.encode("ab<s>") == [257, 0]
    rows = {"0": {"content": "<end>", "special": True}, "300": {"content": "<user>"}}
    added = opened(save(tmp_path / "b", content, config={"added_tokens_decoder": rows}))
    assert added.encode("<user>ab<end>") == [300, 257, 0]


def test_a_file_of_literals_alone_counts_lines(tmp_path, world):
    literals = ["'<s>'", *(line[line.index(" ") + 1 : line.rindex(" ")] for line in lines())]
    plain = opened(save(tmp_path, "\n".join(literals) + "\n", PLAIN))
    assert plain.encode("the abcdé") == world.encode("the abcdé")


def test_what_others_call_vocab_txt_is_no_world_vocabulary(tmp_path):
    assert find_vocabulary(save(tmp_path, "[PAD]\n[UNK]\nthe\n", PLAIN)) is None
    assert find_vocabulary({}) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("300 'ab' 2", "the token or its id repeats"),
        ("1 'xyz' 3", "the token or its id repeats"),
        ("300 'xyz' 4", "the token has 3 bytes"),
        ("300 '' 0", "the token has 0 bytes"),
        ("300 '\\ud800' 3", "the token has 0 bytes"),
        ("0 'xyz' 3", "the id 0 is that of the end"),
        ("300 __import__('os') 3", "not id, literal and length"),
        ("300 'a' + 'b' 2", "not id, literal and length"),
        ("300 xyz 3", "not id, literal and length"),
        ("", "not id, literal and length"),
        (f"300 '{'x' * 600}' 600", "or more than 512"),
    ],
)
def test_damaged_lines_are_refused_by_number(tmp_path, line, words):
    files = save(tmp_path, "\n".join([*lines(), line]) + "\n")
    with pytest.raises(CheckpointError, match=f"line {len(lines()) + 1}.*{words}"):
        opened(files)


def test_a_vocabulary_without_a_byte_and_tokens_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no token for the byte 32"):
        opened(save(tmp_path / "a", "\n".join(x for x in lines() if " ' ' " not in x)))
    config = {"added_tokens_decoder": {"5": {"content": "<user>"}}}
    with pytest.raises(CheckpointError, match="adds the token '<user>' with the id 5"):
        opened(save(tmp_path / "b", "\n".join(lines()), config=config))


def test_what_was_made_is_kept_and_made_anew_when_damaged(tmp_path):
    files = save(tmp_path, "\n".join(lines()))
    made = tokenizer_of_vocabulary(files, files[NUMBERED])
    content = made.read_bytes()
    made.write_bytes(content[:-9])
    assert tokenizer_of_vocabulary(files, files[NUMBERED]) == made
    assert made.read_bytes() == content


def test_a_checkpoint_with_a_vocabulary_alone_has_a_tokenizer(tmp_path):
    folder = rwkv_numpy.save(tmp_path / "model", FINCH)
    save(folder, "\n".join(lines()))
    found = open_model(str(folder)).checkpoint
    assert "tokenizer.json was made of the checkpoint's rwkv_vocab_v20230424.txt" in found.notes[0]
    assert Tokenizer(found.tokenizer_files["tokenizer.json"], "here").encode("ab") == [257]
    (folder / NUMBERED).write_text("1 'a' 1\n")
    assert "no token for the byte 0" in open_model(str(folder)).checkpoint.tokenizer_refusal
