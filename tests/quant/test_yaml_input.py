"""YAML of strangers: texts, lists and mappings, and nothing that stands for more than it says."""

import time

import pytest

from quant.quoted import quoted
from quant.yaml_input import YamlError, parse_yaml

BOMB = "\n".join(
    ["- &a0 [" + ", ".join(["x"] * 10) + "]"]
    + [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
)


def test_every_scalar_is_the_text_that_is_written():
    text = b'{a: 2026-13-45, b: 9_9, c: yes, d: ~, e: .nan, f: 0x1F, g: "\\u00e9"}'
    wanted = {"a": "2026-13-45", "b": "9_9", "c": "yes", "d": "~", "e": ".nan", "f": "0x1F"}
    assert parse_yaml(text) == {**wanted, "g": "é"}
    assert parse_yaml(b"- " + b"9" * 5000) == ["9" * 5000]
    assert parse_yaml(b"\xef\xbb\xbf- a") == ["a"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB.encode(), "'a0' is an alias"),
        (b"- &a x\n- *a", "at line 2, column 3: 'a' is an alias"),
        (b"&a [*a]", "is an alias"),
        (b"{match: a, format: b, match: c}", "at line 1, column 23: the key 'match' occurs twice"),
        (b"- !!python/object/apply:os.system [true]", "the tag 'tag:yaml.org,2002:python"),
        (b"- !!binary eA==", "the tag"),
        (b"? [a]\n: b", "a key is a list or a mapping"),
        (b"- [", "is not YAML at line 1"),
        (b"[" * 100_000, "nested too deep"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'- "\\ud800"', "half of a surrogate pair"),
        (b"--- a\n--- b", "is not YAML"),
    ],
)
def test_what_is_refused(content, words):
    begun = time.monotonic()
    with pytest.raises(YamlError) as caught:
        parse_yaml(content)
    assert words in str(caught.value) and len(str(caught.value)) < 300
    assert time.monotonic() - begun < 20


def test_a_quotation_is_short_whatever_it_quotes():
    bomb: list[object] = ["x"] * 10
    for _ in range(30):
        bomb = [bomb] * 10
    held: dict[str, object] = {}
    held["itself"] = held
    for value in (bomb, held, "x" * 10**6, list(range(10**6)), 1 << 10**6, b"x" * 10**6):
        assert len(quoted(value)) <= 120
    assert quoted("a\x1b[2J") == repr("a\x1b[2J")
