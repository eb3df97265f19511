"""`SizedModel`: a model as far as its sizes are concerned; a ``config.json`` is enough for that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.checkpoint import hub
from edgeforge.checkpoint.checkpoint import read_config
from edgeforge.checkpoint.gguf.source import is_gguf
from edgeforge.checkpoint.imported.registry import read_method
from edgeforge.checkpoint.layout import CONFIG, GENERATION_CONFIG, find_weights
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.families.registry import read_spec
from edgeforge.families.spec import ModelSpec
from edgeforge.model.exit_layer import cut_after
from edgeforge.model.model import DEMO, DEMO_FOLDER, open_model
from edgeforge.planning.choose import as_is, imported_assignments

if TYPE_CHECKING:
    from quant.plans.plan import Assignment, QuantPlan


@dataclass(frozen=True)
class SizedModel:
    """The sizes of a model.

    Attributes:
        source: what the user named.
        spec: the model's dimensions.
        imported: the weights that the checkpoint holds as integers, which stay as they are.
        as_is: the plan that keeps every matrix as the checkpoint has it; None where only the
            configuration was read.
    """

    source: str
    spec: ModelSpec
    imported: Mapping[str, Assignment] = field(default_factory=dict)
    as_is: QuantPlan | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns each weight's shape by program name."""
        return {name: weight.shape for name, weight in self.spec.weights.items()}

    def roles(self) -> dict[str, str]:
        """Returns each weight's role by program name."""
        return {name: weight.role for name, weight in self.spec.weights.items()}


def size_model(
    source: str,
    *,
    revision: str | None = None,
    ignore_config: Iterable[str] = (),
    exit_layer: int | None = None,
) -> SizedModel:
    """Reads a model's sizes; no weight is read, and of a hub's repository only the configuration.

    Args:
        source: a checkpoint folder, a GGUF file, a folder with a ``config.json`` alone, that file,
            a hub id, or ``demo``.
        revision: branch, tag or commit of a hub id.
        ignore_config: config fields that the user knows not to change the maths.
        exit_layer: the layer, counted from 1, after which the model is cut; None for all of it.

    Raises:
        CheckpointError: the configuration is missing, damaged or not supported, or does not say
            enough.
        UsageError: ``revision`` is given with a folder or a file, or the model cannot be cut after
            that layer.
    """
    ignored = tuple(ignore_config)
    path = DEMO_FOLDER if source == DEMO and not Path(DEMO).is_dir() else Path(source).expanduser()
    try:
        is_here = bool(source) and path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source[:200]!r} is not a usable path: {error}") from error
    if is_here and revision is not None:
        raise UsageError(
            f"{source} is here and has no revision: leave out --revision {revision[:100]}"
        )
    if not is_here:
        if not hub.is_hub_id(source):
            raise CheckpointError(
                f"{source[:200]!r} is neither a folder or a {CONFIG} here nor a hub id of the form "
                f"organisation/name"
            )
        path = hub.download_config(source, revision)
    if is_here and (is_gguf(path) or (path.is_dir() and find_weights(path) is not None)):
        return _with_weights(source, path, ignored, exit_layer)
    config = path / CONFIG if path.is_dir() else path
    return _of_config(source, config, ignored, exit_layer)


def _with_weights(
    source: str, path: Path, ignored: tuple[str, ...], exit_layer: int | None
) -> SizedModel:
    model = open_model(str(path), ignore_config=ignored, exit_layer=exit_layer)
    imported = imported_assignments(model.weights)
    return SizedModel(source, model.spec, imported, as_is(model.weights))


def _of_config(
    source: str, path: Path, ignored: tuple[str, ...], exit_layer: int | None
) -> SizedModel:
    if path.suffix != ".json":
        raise CheckpointError(
            f"{source} is a file: name a {CONFIG}, or the folder that holds it with the weights"
        )
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {CONFIG}, which says the model's sizes")
    beside = path.with_name(GENERATION_CONFIG)
    config = read_config(path)
    spec = read_spec(config, read_config(beside) if beside.exists() else {}, ignored)
    if read_method(config, ignored) is not None:
        raise CheckpointError(
            f"{source} is quantized already, and its configuration does not say which weights are: "
            f"name the folder of the whole checkpoint"
        )
    return SizedModel(source, spec if exit_layer is None else cut_after(spec, exit_layer))
