"""JSON of strangers: every fault is one clause, found in bounded time."""

import json

import pytest

from quant.json_input import JsonError, parse_json
from quant.json_output import json_text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "is nested too deep"),
        (b'{"a":' * 100_000, "is nested too deep"),
        (b"[" + b"0," * 3_000_000 + b"0]", "more than a million values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number has 5000 digits"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is beyond every number"),
        (b'{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        ("{}".encode("utf-16"), "is not valid JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"", "is not valid JSON"),
        (b"{} {}", "is not valid JSON"),
    ],
)
def test_what_is_refused(content, words):
    with pytest.raises(JsonError) as caught:
        parse_json(content)
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_read():
    assert parse_json(b'{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"]}') == {
        "a": [1, -2500.0, None, True, "\U0001f600"]
    }


def test_released_configs_are_read():
    """They hold NaN, and some say a key twice: but two values for one key mean nothing."""
    found = parse_json(b'{"a": 1, "b": Infinity, "a": 1}', strict=False)
    assert found == {"a": 1, "b": float("inf")}
    with pytest.raises(JsonError, match="'a' occurs twice, with different values"):
        parse_json(b'{"c": {"a": 1, "a": 2}}', strict=False)
    with pytest.raises(JsonError, match="5000 digits"):
        parse_json(b'{"a": ' + b"9" * 5000 + b"}", strict=False)


def test_what_is_written_is_read_by_every_parser():
    value = {"a": float("nan"), "b": [float("-inf"), 1.5, {"c": (float("inf"), "é")}], 3: None}
    text = json_text(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5, {"c": [None, "é"]}],
        "3": None,
    }
    assert "é" in text
