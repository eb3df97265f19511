"""Options reach the targets that take them and are refused where nobody does."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from exporters.checks import check_options, not_applied
from exporters.errors import ExportError
from exporters.options import NAMES, TargetOptions
from exporters.registry import TARGETS


class One:
    name = "one"
    options = MappingProxyType({"strip": (), "profile": ("gpu", "ane")})
    passed_over = MappingProxyType({"opset": "which has none"})


class Two:
    name = "two"
    options = MappingProxyType({"profile": ("gpu",), "chunk": ()})
    passed_over = MappingProxyType({})


def test_an_option_that_one_of_the_targets_takes_is_fine():
    check_options(TargetOptions(strip=True, profile="gpu", chunk="64"), [One(), Two()])
    check_options(TargetOptions(), [One()])


def test_an_option_that_nobody_takes_is_refused():
    with pytest.raises(ExportError, match=r"one and two have no option --kv-cache: leave it out"):
        check_options(TargetOptions(kv_cache="int8"), [One(), Two()])


def test_a_target_with_a_reason_tells_it():
    words = "one, which has none, and two have no option --opset: leave it out"
    with pytest.raises(ExportError, match=words):
        check_options(TargetOptions(opset="ios17"), [One(), Two()])
    asked = TargetOptions(opset="ios17", chunk="64")
    assert not_applied(asked, One()) == ("--opset ios17 does not apply to one, which has none",)
    assert not_applied(asked, Two()) == not_applied(TargetOptions(), One()) == ()


def test_a_value_is_refused_by_each_target_that_takes_the_option():
    with pytest.raises(ExportError, match="--profile npu is not known to one: take gpu or ane"):
        check_options(TargetOptions(profile="npu"), [One()])
    with pytest.raises(ExportError, match="--profile ane is not known to two: take gpu"):
        check_options(TargetOptions(profile="ane"), [One(), Two()])


def test_a_target_is_given_what_it_takes_alone():
    asked = TargetOptions(strip=True, profile="gpu", chunk="64")
    assert asked.only(Two.options) == TargetOptions(profile="gpu", chunk="64")
    assert asked.given() == {"strip": True, "profile": "gpu", "chunk": "64"}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_take_options_that_exist(name):
    assert set(TARGETS[name].options) <= set(NAMES)
    assert set(TARGETS[name].passed_over) <= set(NAMES) - set(TARGETS[name].options)
