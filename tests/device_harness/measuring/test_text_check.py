"""Generated text, held against what the host chooses: real artifacts, real garbage."""

from __future__ import annotations

import numpy as np
import pytest

from device_harness.measuring.text_check import allowed_differences, check_text
from device_harness.registry import open_session
from device_harness.timed_run import run_timed
from exporters.manifest import Manifest

PROMPT = np.array([5, 77, 301, 12, 9, 410], np.int64)


@pytest.fixture(scope="module")
def host(artifact):
    with open_session(artifact, Manifest.read(artifact), 1) as session:
        yield session


@pytest.fixture(scope="module")
def text(host):
    return run_timed(host, PROMPT, 30).tokens


def test_what_the_host_would_choose_passes(host, text):
    found = check_text(host, PROMPT, [text, text])
    assert (found.verdict, found.agreed, found.of, found.leading) == ("passed", 30, 30, 30)
    assert found.reference == host.runtime and not found.reason


def test_a_choice_that_differs_is_one_though_all_that_follows_does(host, text):
    # The host goes on from the device's own text, as a near tie would have made it.
    other = [*text[:10], (text[10] + 1) % host.vocab_size]
    other += run_timed(host, np.array([*PROMPT, *other], np.int64), 30 - len(other)).tokens
    assert sum(a != b for a, b in zip(other, text, strict=True)) > 5
    found = check_text(host, PROMPT, [other])
    assert (found.verdict, found.agreed, found.leading) == ("passed", 29, 10)


@pytest.mark.parametrize("garbage", ["one token", "random", "outside the vocabulary"])
def test_garbage_is_no_text(host, text, garbage):
    draw = np.random.default_rng(1)
    made = {
        "one token": [3] * 30,
        "random": [int(each) for each in draw.integers(0, host.vocab_size, 30)],
        "outside the vocabulary": [*text[:12], *[host.vocab_size] * 18],
    }[garbage]
    found = check_text(host, PROMPT, [text, made])  # the worst of the runs decides
    assert found.verdict == "failed"
    assert found.agreed < 30 - allowed_differences(30)
    assert f"would have chosen {found.agreed} after the same text" in found.reason


def test_one_in_ten_may_differ(host, text):
    for wrong, verdict in ((3, "passed"), (4, "failed")):
        # Only tokens at the end differ, after which the host need not follow.
        spoilt = [*text[: 30 - wrong], *[int(host.vocab_size)] * wrong]
        assert check_text(host, PROMPT, [spoilt]).verdict == verdict


def test_no_text_is_not_checked(host):
    assert check_text(host, PROMPT, [[]]).verdict == "not checked"
