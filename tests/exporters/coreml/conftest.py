"""Core ML artifacts of the same checkpoints, and coremltools as the judge of them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from device_harness.coreml_session import CoremlSession
from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.options import TargetOptions
from tests.exporters.coreml import slot_models, vocabulary_model

CHUNK = "16"  # so that the 48 tokens of a context take three calls


@pytest.fixture(scope="session")
def package(build):
    """Exports a config for Core ML by a recipe (or a format's name) with the target's options."""

    def package(config, recipe="fp32", context=48, chunk=CHUNK, **options):
        asked = TargetOptions(chunk=chunk, **options)
        return build(config, recipe, context, "coreml", asked)

    return package


@pytest.fixture(scope="session")
def slots_package(tmp_path_factory):
    """Exports a mixture of attention heads by its name and the way to export it, each once."""
    known: dict[tuple[str, str], vocabulary_model.Made] = {}

    def slots_package(spec: str, way: str) -> vocabulary_model.Made:
        if (spec, way) not in known:
            folder = tmp_path_factory.mktemp(f"{spec}-{way}")
            known[spec, way] = slot_models.exported(folder, spec, way)
        return known[spec, way]

    return slots_package


@pytest.fixture(scope="session")
def run_package():
    """Opens an artifact in the interpreter."""

    def run_package(folder: Path, precision: str = "fp32", context: int = 48) -> CoremlSession:
        return CoremlSession(folder, context, 1, precision=precision)

    return run_package


@pytest.fixture(scope="session")
def coremltools():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools

        logging.getLogger("coremltools").setLevel(logging.ERROR)
    return coremltools


@pytest.fixture(scope="session")
def reopen(coremltools):
    """Opens a package as coremltools does, and infers all its types anew.

    Returns the specification and the program in coremltools' own classes.
    """
    from coremltools.converters.mil.frontend.milproto.load import load

    def reopen(folder: Path):
        path = str(folder / names.PACKAGE)
        model = coremltools.models.MLModel(path, skip_model_load=True)
        spec = model.get_spec()
        weights = str((folder / names.PACKAGE / names.WEIGHTS_PATH).parent)
        return spec, load(spec, spec.specificationVersion, weights)

    return reopen


@pytest.fixture(scope="session")
def operations():
    """The operations of a function of an artifact, in order."""

    def operations(folder: Path, function: str):
        return list(open_package(folder / names.PACKAGE).block(function).operations)

    return operations
