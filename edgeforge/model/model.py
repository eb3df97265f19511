"""`Model`: an opened checkpoint with its spec and its weights, as all later stages use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeforge.chat.template import find_template
from edgeforge.chat.turn_end import turn_ends
from edgeforge.checkpoint.adapter import Adapter, open_adapters
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.imported.registry import method_of
from edgeforge.checkpoint.sentencepiece_model import MODEL, converted_tokenizer
from edgeforge.checkpoint.world_vocabulary import find_vocabulary, tokenizer_of_vocabulary
from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from edgeforge.families.spec import ModelSpec
from edgeforge.model.adaptation import Adaptation, adapt, told_of_base
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.model.exit_layer import cut_after
from edgeforge.model.stored_names import named_as_stored
from edgeforge.tokenizer import TOKENIZER

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
        exit_layer: the layer, counted from 1, after which the model is cut; None where it is whole.
        checkpoint_layers: how many layers the checkpoint has.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    weights: CheckpointWeights
    ignored_config: tuple[str, ...] = ()
    exit_layer: int | None = None
    checkpoint_layers: int = 0

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters that are merged into the weights."""
        return self.weights.adaptation.adapters

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the configuration, and the chat template's.

        Raises:
            CheckpointError: a file of the tokenizer is damaged.
        """
        files = self.checkpoint.tokenizer_files
        ends = turn_ends(files, find_template(files))
        known = (token for token in ends if token < self.spec.vocab_size)
        return tuple(dict.fromkeys((*self.spec.eos, *known)))


def open_model(
    source: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    ignore_config: Iterable[str] = (),
    exit_layer: int | None = None,
    adapters: Iterable[str] = (),
) -> Model:
    """Opens a checkpoint and checks it against its configuration.

    Args:
        source: a folder, a GGUF file, a hub id, or ``demo`` for the model that ships here.
        revision: branch, tag or commit of a hub id.
        tokenizer: folder, file or hub id from which to take the tokenizer instead.
        ignore_config: config fields that the user knows not to change the maths.
        exit_layer: the layer, counted from 1, after which the model is cut; None for all of it.
        adapters: adapters to merge into the weights, each ``DIR`` or ``DIR@weight``.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or does not match its configuration.
        UsageError: ``revision`` is given with a folder, or the model cannot be cut after that
            layer.
    """
    where = str(DEMO_FOLDER) if source == DEMO and not Path(DEMO).is_dir() else source
    checkpoint = Checkpoint.open(where, revision=revision, tokenizer=tokenizer)
    _convert_tokenizer(checkpoint)
    ignored = tuple(ignore_config)
    spec = read_spec(checkpoint.config, checkpoint.generation_config, ignored)
    method = method_of(checkpoint, ignored)
    spec, adaptation = _adapted(checkpoint, spec, open_adapters(adapters), method is None)
    weights = CheckpointWeights(checkpoint, spec, method, adaptation)
    layers = len(spec.layers)
    if exit_layer is not None:
        spec = cut_after(weights.spec, exit_layer)
        weights = CheckpointWeights(checkpoint, spec, method, adaptation)
    return Model(checkpoint, weights.spec, weights, ignored, exit_layer, layers)


def _adapted(
    checkpoint: Checkpoint, spec: ModelSpec, adapters: tuple[Adapter, ...], plain: bool
) -> tuple[ModelSpec, Adaptation]:
    """Returns the spec, with the names of the checkpoint, and how adapters change its tensors."""
    spec = named_as_stored(spec, checkpoint.tensors)
    if not adapters:
        return spec, Adaptation()
    for adapter in adapters:
        checkpoint.source_files.watch(adapter.files)
        checkpoint.warnings += told_of_base(adapter, checkpoint)
    changed, adaptation = adapt(adapters, checkpoint, spec, plain=plain)
    listed = " and ".join(adapter.described() for adapter in adapters)
    checkpoint.notes += (
        f"FLOAT is the checkpoint with {listed} merged into its weights before they were quantized",
        *(
            (
                "the head, which the checkpoint ties to the embedding, is a matrix of its own, "
                "because an adapter changes one of the two",
            )
            if spec.tied and not changed.tied
            else ()
        ),
    )
    return changed, adaptation


def _convert_tokenizer(checkpoint: Checkpoint) -> None:
    """Makes a ``tokenizer.json`` of another file that is a checkpoint's only tokenizer.

    That is a SentencePiece model, or RWKV's World vocabulary. Where it is not possible, `export`
    refuses the checkpoint; what needs no text goes on.
    """
    files = checkpoint.tokenizer_files
    if TOKENIZER in files:
        return
    world = find_vocabulary(files)
    if MODEL not in files and world is None:
        return
    try:
        if MODEL in files:
            files[TOKENIZER] = converted_tokenizer(files)
        elif world is not None:
            files[TOKENIZER] = tokenizer_of_vocabulary(files, world)
    except CheckpointError as error:
        checkpoint.tokenizer_refusal = str(error)
        return
    checkpoint.source_files.watch([files[TOKENIZER]])
    if MODEL in files:
        note = (
            "tokenizer.json was made of the checkpoint's tokenizer.model by transformers, and "
            "gives the same tokens as SentencePiece on the texts that were tried"
        )
    else:
        assert world is not None
        note = (
            f"tokenizer.json was made of the checkpoint's {world.name}: it takes the longest token "
            f"at each byte, as RWKV's World tokenizer, by a regular expression of all tokens"
        )
    checkpoint.notes += (note,)
