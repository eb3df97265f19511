"""The conversations: in the template of a model, in whole blocks, and never calibrated on."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from edgeforge.model.model import CALIBRATION_TEXT, DEMO_FOLDER, open_model

TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}BEGIN {% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
)


@pytest.fixture
def yardstick(benchmark):
    return benchmark("yardstick")


def model(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    files = {
        "tokenizer.json": DEMO_FOLDER / "tokenizer.json",
        "tokenizer_config.json": tmp_path / "tokenizer_config.json",
    }
    return SimpleNamespace(checkpoint=SimpleNamespace(tokenizer_files=files, source="here"))


def test_a_block_begins_with_a_conversation_and_is_whole(yardstick, tmp_path):
    blocks = yardstick.chat_blocks(model(tmp_path, TEMPLATE), 2048)
    assert len(blocks) == 8
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))
    first = json.loads(yardstick.CONVERSATIONS.read_text())[0]
    for block in blocks:
        assert len(block) == 256
        assert tokenizer.decode(block.tolist()).lstrip().startswith("BEGIN [user] ")
    assert first[0] in tokenizer.decode(blocks[0].tolist())
    assert "[assistant]" in tokenizer.decode(blocks[0].tolist())


def test_a_model_without_a_template_has_no_conversations(yardstick):
    assert yardstick.chat_blocks(open_model("demo"), 2048) == []


def test_forty_conversations_in_which_user_and_assistant_take_turns(yardstick):
    conversations = json.loads(yardstick.CONVERSATIONS.read_text())
    assert len(conversations) == 40
    assert all(turns and len(turns) % 2 == 0 and all(turns) for turns in conversations)


def test_no_passage_of_a_conversation_is_in_the_calibration_text(yardstick):
    def words(text):
        return re.findall(r"\w+", text.lower())

    known = words(CALIBRATION_TEXT.read_text())
    passages = {tuple(known[at : at + 8]) for at in range(len(known) - 7)}
    for turns in json.loads(yardstick.CONVERSATIONS.read_text()):
        for turn in turns:
            said = words(turn)
            assert not passages & {tuple(said[at : at + 8]) for at in range(len(said) - 7)}, turn


def test_a_second_model_that_is_not_there_is_left_out_with_one_sentence(
    yardstick, tmp_path, capsys
):
    found = yardstick.find_models(["demo", "llama"], tmp_path, tmp_path / "none")
    assert found == {"demo": "demo"}
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("Llama-17M is left out: ") and "build.py --llama" in said
