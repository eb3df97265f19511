"""Sound exports of small models up to where files are written, made once for all tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from exporters.registry import TARGETS
from tests.exporters.conftest import llama, phi3, write_checkpoint
from tests.oracles import vocabulary
from tests.oracles.vocabulary import SPECS
from tests.oracles.vocabulary_models import small_model
from tests.planted_faults.captured import Captured, capture

CONTEXT = 128
LONGROPE = phi3(
    head_dim=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
    original_max_position_embeddings=64,
    rope_scaling={
        "type": "longrope",
        "long_factor": [1 + 0.9 * i for i in range(16)],
        "short_factor": [1 + 0.1 * i for i in range(16)],
    },
)

Captures = Callable[[str], dict[str, Captured]]


@pytest.fixture(scope="session")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captures]:
    """Sound exports to all targets, by what they are of."""
    root = tmp_path_factory.mktemp("captured")
    made: dict[str, dict[str, Captured]] = {}
    configs = {"llama": llama(), "another": llama(), "longrope": LONGROPE}

    def captures(name: str) -> dict[str, Captured]:
        if name == "vocabulary" and name not in made:
            model = small_model(SPECS["everything"], root / name)
            options = ExportOptions(recipe="int8", context=vocabulary.CONTEXT, threads=1)
            made[name] = capture(model, list(TARGETS.values()), options, root / f"{name}-out")
        if name not in made:
            seed = list(configs).index(name)
            model = open_model(str(write_checkpoint(root / name, configs[name], seed)))
            options = ExportOptions(recipe="int4", context=CONTEXT, threads=1)
            made[name] = capture(model, list(TARGETS.values()), options, root / f"{name}-out")
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        yield captures
