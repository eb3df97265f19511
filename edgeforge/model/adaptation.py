"""`Adaptation`: how adapters change the tensors of a checkpoint, row by row, before anything else.

Given a matrix ``W`` of a checkpoint and an adapter's factors, the merged matrix is
``W + weight * scale * B A`` (LoRA, arXiv 2106.09685; with rank-stabilized scales, arXiv
2312.03732), or ``m * (W + scale * B A) / |W + scale * B A|`` with a length for each row (DoRA,
arXiv 2402.09353). Every row depends on that row of ``W`` alone, so rows are merged as they are
read, and memory stays what it is without an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from edgeforge.checkpoint.adapter import Adapter, Factors, read_floats
from edgeforge.checkpoint.tensor_entry import TensorEntry
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import EMBEDDING, HEAD
from edgeforge.families.spec import ModelSpec, Piece, WeightSpec

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint

_TEXT: Final = "language_model."
# What files of the hub call a mixture's part, which transformers names as any other.
_MIXTURE: Final = "block_sparse_moe."
# Bytes of a tensor that are compared at a time.
_COMPARED_BYTES: Final = 1 << 24


@dataclass(frozen=True)
class Change:
    """What one adapter adds to a matrix."""

    adapter: Adapter
    factors: Factors

    def merged(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Returns rows of the merged matrix: ``float32[n, in]``.

        Args:
            rows: the same rows before, ``float32[n, in]``.
            start: the first of them in the whole matrix.
        """
        import torch

        read, given = self.adapter.tensors, self.factors
        stop, width = start + len(rows), given.rank
        if given.embedding:
            down = read_floats(read, given.down, 0, width)[:, start:stop]
            up = read_floats(read, given.up, 0, rows.shape[1])
            change = down.T @ up.T
        else:
            down = read_floats(read, given.down, 0, width)
            change = read_floats(read, given.up, start, stop) @ down
        found: torch.Tensor = rows + change * (given.scale * self.adapter.weight)
        if given.magnitude is None:
            return found
        lengths = read_floats(read, given.magnitude, start, stop).reshape(-1)
        norms = torch.linalg.vector_norm(found, dim=1)
        found *= (lengths / norms)[:, None]
        return found


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of a checkpoint's.

    Attributes:
        tensors: reads it.
        stored: its name there.
    """

    tensors: Checkpoint
    stored: str

    @property
    def entry(self) -> TensorEntry:
        """Its dtype, shape and place."""
        return self.tensors.tensors[self.stored]


@dataclass(frozen=True)
class Adaptation:
    """How adapters change the tensors of a checkpoint.

    Attributes:
        adapters: the adapters, in the order given.
        changes: what is added to a tensor, by its name in the checkpoint.
        replaced: the tensors that take a tensor's place, by its name in the checkpoint.
    """

    adapters: tuple[Adapter, ...] = ()
    changes: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    replaced: Mapping[str, Replacement] = field(default_factory=dict)

    def merged(self, tensor: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Returns rows of a tensor with all that is added to them; as they are where nothing is.

        Args:
            tensor: the tensor's name in the checkpoint.
            rows: rows of it.
            start: the first of them.
        """
        for change in self.changes.get(tensor, ()):
            rows = change.merged(rows.float(), start)
        return rows

    def digest_rows(self) -> list[tuple[str, float]]:
        """Returns the digest and the weight of each adapter."""
        return [(adapter.sha256, adapter.weight) for adapter in self.adapters]


def adapt(
    adapters: Sequence[Adapter], checkpoint: Checkpoint, spec: ModelSpec, *, plain: bool
) -> tuple[ModelSpec, Adaptation]:
    """Returns how adapters change a model's tensors, and the spec of the changed model.

    It is the given spec, but for a model that ties its head to its embedding and an adapter that
    changes one of the two: the head is then a matrix of its own, as it was while peft trained.

    Args:
        adapters: the opened adapters.
        checkpoint: the checkpoint.
        spec: the model's spec, with the names that its tensors have in the checkpoint.
        plain: whether all tensors of the checkpoint are plain floats.

    Raises:
        CheckpointError: an adapter is of another model, or two change what only one can.
    """
    replaced = {
        (adapter.source, name): stored
        for adapter in adapters
        for name, stored in adapter.replaced.items()
        if not _is_copy(adapter, stored, name, checkpoint)
    }
    modules = {f"{module}.weight" for adapter in adapters for module in adapter.factors}
    touched = {_plain(name) for name in (*modules, *(name for _, name in replaced))}
    own_head = _head_of_its_own(checkpoint, spec, touched, plain)
    if own_head is not None:
        spec = untied(spec)
    return spec, _matched(adapters, spec, replaced, own_head)


def changes_of(adapters: Sequence[Adapter], spec: ModelSpec) -> Adaptation:
    """Returns how adapters that replace no tensor change a model's; a tied head takes none.

    Raises:
        CheckpointError: an adapter is of another model.
    """
    return _matched(adapters, spec, {}, None)


def _matched(
    adapters: Sequence[Adapter],
    spec: ModelSpec,
    kept: Mapping[tuple[str, str], str],
    own_head: Replacement | None,
) -> Adaptation:
    """Returns the changes by the checkpoint's names; ``kept`` are the tensors that replace any."""
    pieces = {p.tensor: p for weight in spec.weights.values() for p in weight.pieces}
    names = {_plain(name): name for name in pieces}
    changes: dict[str, list[Change]] = {}
    replaced: dict[str, Replacement] = {}
    for adapter in adapters:
        for (source, name), stored in kept.items():
            if source != adapter.source:
                continue
            tensor = _known(adapter, name, names, spec)
            _check_shape(adapter, stored, pieces[tensor].tensor_shape, name)
            if tensor in replaced or adapter.weight != 1:
                raise CheckpointError(
                    f"the adapter {adapter.source} replaces {name}, so it can have no weight but 1 "
                    f"and stand beside no other that replaces it too"
                )
            replaced[tensor] = Replacement(adapter.tensors, stored)
        for module, factors in adapter.factors.items():
            tensor = _known(adapter, f"{module}.weight", names, spec)
            _check_factors(adapter, factors, pieces[tensor], module)
            changes.setdefault(tensor, []).append(Change(adapter, factors))
        _check_whole(adapter, names)
    for tensor, given in changes.items():
        lengths = [each.adapter for each in given if each.factors.magnitude is not None]
        if lengths and (len(given) > 1 or lengths[0].weight != 1):
            raise CheckpointError(
                f"the adapter {lengths[0].source} gives {tensor} lengths (DoRA), which hold for "
                f"what it was trained on alone: give it without a weight and without another "
                f"adapter for that matrix"
            )
    if own_head is not None:
        replaced.setdefault(HEAD, own_head)
    return Adaptation(tuple(adapters), changes, replaced)


def untied(spec: ModelSpec) -> ModelSpec:
    """Returns the spec of a tied model whose head is a tensor of its own, named `HEAD`."""
    embedding = spec.weights[EMBEDDING]
    head = WeightSpec(embedding.shape, (Piece(HEAD, embedding.shape),), "head")
    ignored = tuple(name for name in spec.ignored if name != HEAD)
    return replace(spec, tied=False, weights={**spec.weights, HEAD: head}, ignored=ignored)


def _head_of_its_own(
    checkpoint: Checkpoint, spec: ModelSpec, touched: set[str], plain: bool
) -> Replacement | None:
    """Returns the head that a tied model has beside its embedding once one of them is changed."""
    (embedding,) = spec.weights[EMBEDDING].pieces
    if not spec.tied or not touched & {_plain(embedding.tensor), HEAD}:
        return None
    if not plain or embedding.tensor == HEAD:
        raise CheckpointError(
            f"the adapter changes the embedding or the head, which this checkpoint holds as one "
            f"tensor, {embedding.tensor}, in a form that cannot be told apart: give the original "
            f"checkpoint with --adapter"
        )
    return Replacement(checkpoint, embedding.tensor)


def _is_copy(adapter: Adapter, stored: str, name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor is the model's own, which peft saves beside a change of an embedding."""
    if ".base_layer." not in stored:
        return False
    entry = adapter.tensors.tensors[stored]
    own = {_plain(each): each for each in checkpoint.tensors}.get(_plain(name))
    if own is None or checkpoint.tensors[own].shape != entry.shape:
        return False
    if checkpoint.tensors[own].dtype != entry.dtype:
        return False
    step = max(1, _COMPARED_BYTES * entry.shape[0] // max(1, entry.nbytes))
    return all(
        checkpoint.read_rows(own, at, min(at + step, entry.shape[0])).tobytes()
        == adapter.tensors.read_rows(stored, at, min(at + step, entry.shape[0])).tobytes()
        for at in range(0, entry.shape[0], step)
    )


def told_of_base(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns a warning where an adapter says that it was trained for another model."""
    known = (checkpoint.source, checkpoint.config.get("_name_or_path"))
    names = {_last(name) for name in known if isinstance(name, str)} - {""}
    base = _last(adapter.config.base)
    if not base or base in names:
        return ()
    return (
        f"the adapter {adapter.source} says that it was trained for {adapter.config.base[:200]}, "
        f"and the checkpoint is {checkpoint.source}: names and shapes fit, but only that model's "
        f"own weights do",
    )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _plain(name: str) -> str:
    """Returns a tensor's name without what a wrapping model puts before it.

    >>> _plain("model.language_model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    name = name.replace(_TEXT, "").replace(_MIXTURE, "mlp.")
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name


def _known(adapter: Adapter, name: str, names: Mapping[str, str], spec: ModelSpec) -> str:
    """Returns the checkpoint's name of a tensor that an adapter speaks of."""
    found = names.get(_plain(name))
    if found is None:
        base = f"; it says that its model is {adapter.config.base}" if adapter.config.base else ""
        raise CheckpointError(
            f"the adapter {adapter.source} changes {name[:200]}, which this {spec.model_type} "
            f"model does not have: it belongs to another model{base}"
        )
    return found


def _check_shape(adapter: Adapter, stored: str, wanted: tuple[int, ...], name: str) -> None:
    shape = adapter.tensors.tensors[stored].shape
    if shape != wanted:
        raise CheckpointError(
            f"the adapter {adapter.source} replaces {name} by one of shape {list(shape)}; the "
            f"model's has {list(wanted)}: it belongs to another model, or to one whose vocabulary "
            f"was enlarged"
        )


def _check_factors(adapter: Adapter, factors: Factors, piece: Piece, module: str) -> None:
    entries, shape = adapter.tensors.tensors, piece.tensor_shape
    down, up = entries[factors.down].shape, entries[factors.up].shape
    made = (down[1], up[0]) if factors.embedding else (up[0], down[1])
    if piece.matrices:
        raise CheckpointError(
            f"the adapter {adapter.source} changes {module} by one matrix of shape {list(made)}; "
            f"the model's tensor holds the matrices of {piece.matrices} experts, which EdgeForge "
            f"changes only one by one: train the adapter for other modules"
        )
    if len(shape) != 2 or made != shape:
        raise CheckpointError(
            f"the adapter {adapter.source} changes {module} by a matrix of shape {list(made)}; the "
            f"model's has {list(shape)}: it belongs to another model"
        )
    if factors.magnitude is not None:
        lengths = entries[factors.magnitude].shape
        if lengths not in ((shape[0],), (shape[0], 1)):
            raise CheckpointError(
                f"the adapter {adapter.source} gives {module} {list(lengths)} lengths (DoRA); the "
                f"model's has {shape[0]} rows: it belongs to another model"
            )


def _check_whole(adapter: Adapter, names: Iterable[str]) -> None:
    """Refuses an adapter that lacks modules that its configuration names."""
    if not adapter.config.whole:
        return
    held = {_plain(f"{module}.weight") for module in adapter.factors}
    for name in names:
        module = name.removesuffix(".weight")
        wanted = any(f".{module}".endswith(f".{end}") for end in adapter.config.target_modules)
        if wanted and name.endswith(".weight") and name not in held:
            raise CheckpointError(
                f"the adapter {adapter.source} lacks {module}, which its target_modules name: it "
                f"is not whole, or belongs to a model with fewer layers"
            )
