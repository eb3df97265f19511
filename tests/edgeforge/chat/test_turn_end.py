"""The token by which a template ends what the assistant says."""

import json

import pytest

from edgeforge.chat.template import ChatTemplate
from edgeforge.chat.turn_end import turn_ends

ROWS = [
    {"id": 5, "content": "<|im_end|>", "special": True},
    {"id": 6, "content": "<|im_end|>x", "special": True},
    {"id": 7, "content": "</s>", "special": False},
]


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": ROWS}))
    return {path.name: path}


@pytest.mark.parametrize(
    ("written", "ends"),
    [
        ("<|im_end|>\n", (5,)),
        ("\n <|im_end|>", (5,)),
        ("<|im_end|>x", (6,)),
        ("</s>", (7,)),
        ("\n### Human:", ()),
        ("", ()),
        ("word </s>", ()),
        ("{{ raise_exception('never') }}", ()),
    ],
)
def test_it_is_the_longest_added_token_behind_an_answer(files, tmp_path, written, ends):
    text = "{% for m in messages %}" + "<|{{ m.role }}|>{{ m.content }}" + written + "{% endfor %}"
    assert turn_ends(files, ChatTemplate(tmp_path / "x.jinja", text)) == ends
    assert turn_ends(files, None) == ()


def test_the_configuration_lists_added_tokens_too(files, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {"9": {"content": "</s>"}}}))
    template = ChatTemplate(tmp_path / "x.jinja", "{{ messages[-1].content }}</s>")
    assert turn_ends({**files, path.name: path}, template) == (9,)


def test_a_damaged_tokenizer_is_left_to_whoever_opens_it(files, tmp_path):
    files["tokenizer.json"].write_text("{")
    template = ChatTemplate(tmp_path / "x.jinja", "{{ messages[-1].content }}</s>")
    assert turn_ends(files, template) == ()
