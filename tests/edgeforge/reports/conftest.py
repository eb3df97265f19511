"""Artifacts of one checkpoint with their reports, made once for comparisons and pages."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify import verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.registry import find_target


@pytest.fixture(scope="session")
def reported(tmp_path_factory) -> SimpleNamespace:
    """``int4`` and ``int8`` on the same tokens, and ``bare`` without a report."""
    root = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model = open_model(str(synthesise("tiny-llama", root / "model")))
        folders = []
        for recipe in ("int4", "int8"):
            options = ExportOptions(recipe, context=64)
            folders += export(model, [find_target("onnx")], root / "all" / recipe, options)
        shutil.copytree(folders[0], root / "bare")
        verify_together(folders, VerifyOptions(tokens=640, timed=False))
    return SimpleNamespace(root=root, all=root / "all", int4=folders[0], int8=folders[1])


@pytest.fixture
def copies(reported, tmp_path) -> Path:
    """The artifacts with reports, to be changed."""
    shutil.copytree(reported.all, tmp_path / "all")
    return tmp_path / "all"
