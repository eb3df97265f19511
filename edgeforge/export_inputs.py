"""What an export reads: none of it may be replaced by the output, and none may change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeforge.cache import cache_dir
from edgeforge.checkpoint.links import repository_of
from edgeforge.checkpoint.source_files import SourceFiles
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import Model
from edgeforge.output_folder.inputs import Input, refuse_inputs


@dataclass(frozen=True)
class ExportInputs:
    """The files and folders that an export reads.

    Attributes:
        inputs: all of them, for `edgeforge.output_folder.inputs.refuse_inputs`.
        beside: the files that do not belong to the checkpoint, as they were at the beginning.
        model: the opened model, whose checkpoint watches its own files.
    """

    inputs: tuple[Input, ...]
    beside: SourceFiles
    model: Model

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuses, when the block ends, what is not as it was; that explains an error in it, too.

        Raises:
            EdgeForgeError: as `require_unchanged`.
        """
        try:
            yield
        except Exception:
            self.require_unchanged()
            raise
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Refuses what is not as it was when it was first looked at.

        Raises:
            CheckpointError: a file of the checkpoint or its tokenizer changed.
            UsageError: the calibration text or the recipe's file changed.
        """
        self.model.checkpoint.require_unchanged()
        self.beside.require_unchanged()


def inputs_of(model: Model, options: ExportOptions) -> ExportInputs:
    """Returns what an export reads; call it before the calibration text or a recipe is read.

    Raises:
        UsageError: partial results would be kept in what is read.
    """
    checkpoint = model.checkpoint
    beside_weights = [
        Path(text if Path(text).is_dir() else text.rpartition("@")[0]).expanduser()
        for text in options.separate_adapters
    ]
    is_file = checkpoint.gguf is not None
    folder = repository_of(checkpoint.folder) or checkpoint.folder
    named = {"the calibration text": options.calibration.source, "the recipe": options.recipe}
    files = {
        what: Path(name).expanduser()
        for what, name in named.items()
        if name is not None and os.path.isfile(os.path.expanduser(name))
    }
    beside = SourceFiles(UsageError)
    beside.watch(files.values())
    inputs = [
        *(() if is_file else (Input("the checkpoint", folder, whole=True),)),
        Input("the cache", cache_dir()),
        *(Input("the adapter", adapter.place, whole=True) for adapter in model.adapters),
        *(Input("the adapter", folder, whole=True) for folder in beside_weights),
        *(Input("the weights", path) for path in checkpoint.files),
        *(Input("the tokenizer's file", path) for path in checkpoint.tokenizer_files.values()),
        *(Input(what, path) for what, path in files.items()),
    ]
    if options.resume is not None:
        refuse_inputs(options.resume, inputs, "--resume")
        inputs.append(Input("the folder of partial results", options.resume, whole=True))
    return ExportInputs(tuple(inputs), beside, model)
