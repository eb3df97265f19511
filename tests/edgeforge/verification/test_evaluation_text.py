"""Texts to evaluate on: plain ones as they are, documents of lines of JSON one after the other."""

from __future__ import annotations

import json

import pytest

from edgeforge.errors import UsageError
from edgeforge.verification.evaluation_text import read_evaluation_text


def test_documents_of_lines_are_joined_and_plain_text_is_not_looked_into(tmp_path):
    documents = ["größe\nzwei", "separator \u2028 within", "three"]
    lines = [{"id": 1, "text": documents[0]}, documents[1], {"text": documents[2]}]
    written = "\n\n".join(json.dumps(each, ensure_ascii=False) for each in lines)
    for name in ("a.jsonl", "a.NDJSON"):
        (tmp_path / name).write_text(written, encoding="utf-8")
        assert read_evaluation_text(tmp_path / name) == "\n\n".join(documents)
    (tmp_path / "a.txt").write_text(written, encoding="utf-8")
    assert read_evaluation_text(tmp_path / "a.txt") == written


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("3", "line 2 of .* is 3, neither a text nor an object"),
        ('{"content": "a"}', "neither a text nor an object with one under 'text'"),
        ('{"text": null}', "neither a text"),
        ("NaN", "line 2 of"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(UsageError, match=words):
        read_evaluation_text(path)


def test_documents_without_text_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " "}\n""\n')
    with pytest.raises(UsageError, match="holds no text"):
        read_evaluation_text(path)
