"""The pages of the API name what there is, all public functions and all operators."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import edgeforge
import quant.program.dialect  # noqa: F401  defines every operator

PAGES = Path(__file__).parents[2] / "docs" / "api"
NAMED = {
    name
    for page in PAGES.glob("*.md")
    for name in re.findall(r"^\.\. autoapi\w+:: (\S+)", page.read_text(), re.M)
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_what_a_page_shows_exists(name):
    module, _, member = name.rpartition(".")
    assert hasattr(import_module(module), member)


def test_every_public_function_is_shown():
    assert {f"edgeforge.api.{name}" for name in edgeforge.__all__} <= NAMED


def test_every_operator_is_shown():
    defined = {
        name.removeprefix("edgeforge::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("edgeforge::")
    }
    shown = {name.rpartition(".")[2] for name in NAMED if "_ops." in name or ".ops." in name}
    assert defined == shown
