"""`Model`: an opened checkpoint with its spec and its weights, as all later stages use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.imported.registry import method_of
from edgeforge.families.registry import read_spec
from edgeforge.families.spec import ModelSpec
from edgeforge.model.checkpoint_weights import CheckpointWeights

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
HELDOUT = DEMO_FOLDER / "heldout.txt"
CALIBRATION_TEXT = DEMO_FOLDER / "calibration.txt"
CONVERSATIONS = DEMO_FOLDER / "conversations.json"


@dataclass(frozen=True)
class Model:
    """A checkpoint whose configuration is supported and whose tensors are all present.

    Attributes:
        checkpoint: the opened checkpoint.
        spec: the model's dimensions.
        weights: reads the model's weights by program name.
        ignored_config: config fields that the user knows not to change the maths.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    weights: CheckpointWeights
    ignored_config: tuple[str, ...] = ()


def open_model(
    source: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    ignore_config: Iterable[str] = (),
) -> Model:
    """Opens a checkpoint and checks it against its configuration.

    Args:
        source: a folder, a GGUF file, a hub id, or ``demo`` for the model that ships with EdgeForge.
        revision: branch, tag or commit of a hub id.
        tokenizer: folder, file or hub id from which to take the tokenizer instead.
        ignore_config: config fields that the user knows not to change the maths.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not match its configuration.
        UsageError: ``revision`` is given with a folder.
    """
    where = str(DEMO_FOLDER) if source == DEMO and not Path(DEMO).is_dir() else source
    checkpoint = Checkpoint.open(where, revision=revision, tokenizer=tokenizer)
    ignored = tuple(ignore_config)
    spec = read_spec(checkpoint.config, checkpoint.generation_config, ignored)
    weights = CheckpointWeights(checkpoint, spec, method_of(checkpoint, ignored))
    return Model(checkpoint, weights.spec, weights, ignored)
