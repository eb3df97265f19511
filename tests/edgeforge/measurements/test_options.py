"""What a user writes as lengths and devices."""

from __future__ import annotations

import pytest

from edgeforge.errors import UsageError
from edgeforge.measurements.options import lengths, parse_devices, parse_lengths


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "128,", "a", "1e3", "٣", "9999999999"])
def test_no_length(text):
    with pytest.raises(UsageError, match="which is no number of tokens"):
        parse_lengths(text, "--prompt")


def test_lengths_are_taken_once_each():
    assert parse_lengths(" 512, 128,512", "--prompt") == (512, 128)
    assert lengths([1, 2], "prompt") == (1, 2) and lengths(5, "prompt") == (5,)
    assert lengths(None, "prompt") == ()
    with pytest.raises(UsageError, match="65 lengths"):
        parse_lengths(",".join(map(str, range(1, 66))), "--prompt")


def test_devices():
    assert parse_devices(["android:A, host", "host"]) == ("android:A", "host")
    with pytest.raises(UsageError, match="empty name"):
        parse_devices(["host,"])
