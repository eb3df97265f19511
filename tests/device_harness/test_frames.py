"""Frames, and streams that hold none."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from device_harness.frames import LONGEST_LINE, FrameError, read_frame, write_frame


def written(words, arrays=()) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, words, arrays)
    return stream.getvalue()


def test_what_was_written_is_read():
    arrays = [
        np.arange(6, dtype=np.int64),
        np.ones((2, 3), np.float32),
        np.zeros((0, 4), np.float32),
    ]
    stream = io.BytesIO(written({"call": "a"}, arrays) + written({"call": "b"}))
    words, found = read_frame(stream, 1000)
    assert words == {"call": "a"}
    for given, each in zip(arrays, found, strict=True):
        assert (each == given).all() and each.dtype == given.dtype and each.shape == given.shape
    assert read_frame(stream, 0) == ({"call": "b"}, [])
    assert read_frame(stream, 0) is None


def test_an_array_in_any_layout_is_written_in_order():
    given = np.arange(6, dtype=np.float32).reshape(2, 3).T
    _, (found,) = read_frame(io.BytesIO(written({}, [given])), 24)
    assert (found == given).all()


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"{}\n",
        b'{"arrays": 3}\n',
        b'{"arrays": [{"dtype": "object", "shape": [1]}]}\n',
        b'{"arrays": [{"dtype": "float32", "shape": [-1]}]}\n',
        b'{"arrays": [{"dtype": "float32", "shape": [true]}]}\n',
        b'{"arrays": [{"dtype": "float32", "shape": "33"}]}\n',
        b'{"arrays": [{"dtype": "float32", "shape": [1e3]}]}\n',
        b'{"arrays": [{"dtype": ["float32"], "shape": [1]}]}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (LONGEST_LINE + 5),
        b'{"arrays": [',
    ],
)
def test_what_is_no_frame_is_refused(line):
    with pytest.raises(FrameError) as caught:
        read_frame(io.BytesIO(line), 1000)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_a_frame_larger_than_allowed_is_refused_before_it_is_read():
    huge = json.dumps({"arrays": [{"dtype": "float32", "shape": [1 << 40]}]}).encode() + b"\n"
    with pytest.raises(FrameError, match="at most 1000 can come"):
        read_frame(io.BytesIO(huge), 1000)


def test_a_stream_that_ends_within_a_frame_is_refused():
    whole = written({}, [np.ones(8, np.float32)])
    with pytest.raises(FrameError, match="ends within"):
        read_frame(io.BytesIO(whole[:-1]), 1000)
