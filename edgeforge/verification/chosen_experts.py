"""Reads which experts the tokens of a text choose while an artifact runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from device_harness.errors import DeviceError
from device_harness.session import Session, Shown, Tokens
from edgeforge.reference.choices import Choice
from edgeforge.verification.meaning.chains import NoDecoderError
from edgeforge.verification.meaning.decoder import decoder_of
from edgeforge.verification.meaning.registry import READERS
from exporters.lifted import EntryPoint
from exporters.manifest import Manifest
from quant.program import dialect
from quant.program.program import shape_of

# The name of every target's entry point for drafts, without an ending.
_DRAFT = "draft"


@dataclass(frozen=True)
class RouterNames:
    """A router's values, as an entry point of the files names them.

    Attributes:
        logits: ``float[1, t, E]``.
        weights: of all experts, ``float[1, t, E]``, or of the chosen ones, ``float[1, t, chosen]``.
        experts: the values that say which experts those are; empty where it is all.
    """

    logits: str
    weights: str
    experts: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Every name."""
        return (self.logits, self.weights, *self.experts)


@dataclass(frozen=True)
class ArtifactRouters:
    """The routers of an artifact, in the program's order.

    Attributes:
        whole: of what gives the logits of every position; empty where nothing does.
        shipped: of what `Session.extend` runs.
        why_none: why they are not known; empty where they are.
    """

    whole: tuple[RouterNames, ...] = ()
    shipped: tuple[RouterNames, ...] = ()
    why_none: str = ""


def artifact_routers(folder: Path, manifest: Manifest) -> ArtifactRouters:
    """Reads from an artifact's files which values its routers are.

    Raises:
        ExportError: a file is missing or damaged.
    """
    reader = READERS.get(manifest.target)
    if reader is None:
        return ArtifactRouters(why_none=f"the graphs of the target {manifest.target} are not read")
    shipped: list[tuple[RouterNames, ...]] = []
    whole: tuple[RouterNames, ...] = ()
    reading = reader(folder, manifest)
    for entry in reading.entry_points:
        if entry.name.partition(".")[0] == _DRAFT:
            continue
        try:
            names, last = _routers(entry)
        except NoDecoderError as error:
            return ArtifactRouters(why_none=f"{entry.name} is not read: {error}")
        # What gives all positions comes last; a function for one token gives all of its positions.
        whole = () if last else names
        shipped.append(names)
    if len(shipped) > 1 and whole:
        shipped.pop()
    if not shipped or len(set(shipped)) > 1:
        return ArtifactRouters(why_none="its entry points name their routers' values differently")
    return ArtifactRouters(whole, shipped[0])


def _routers(entry: EntryPoint) -> tuple[tuple[RouterNames, ...], int]:
    decoder = decoder_of(entry.logits)
    routes = [router.route for layer in decoder.layers for router in layer.routers()]
    names = tuple(RouterNames(each.source.name, each.name, each.experts) for each in routes)
    return names, decoder.last


class RouterReader:
    """Reads an artifact's choices of experts while it runs.

    Args:
        session: the artifact.
        found: its routers.
        routers: QUANTIZED's; none where it has no mixture of experts.

    Attributes:
        why_none: why choices could not be read; empty where all could.
    """

    def __init__(
        self, session: Session, found: ArtifactRouters, routers: Sequence[fx.Node]
    ) -> None:
        self._session, self._found, self._routers = session, found, routers
        self.why_none = found.why_none

    def choices(
        self, texts: Sequence[Tokens], calls: Sequence[Sequence[int]] | None = None
    ) -> list[list[Choice]] | None:
        """As `read_choices`; None where the runtime does not show them."""
        if self.why_none:
            return None
        try:
            return read_choices(self._session, self._found, self._routers, texts, calls)
        except DeviceError as error:
            self.why_none = str(error)
            return None


def read_choices(
    session: Session,
    found: ArtifactRouters,
    routers: Sequence[fx.Node],
    texts: Sequence[Tokens],
    calls: Sequence[Sequence[int]] | None = None,
) -> list[list[Choice]]:
    """Runs texts and returns what each router chose for their tokens.

    Args:
        session: the artifact.
        found: its routers.
        routers: QUANTIZED's.
        texts: ``int64[t]`` each, fresh texts.
        calls: how many tokens each call of what ships takes, for each text; None for what gives
            the logits of every position.

    Returns:
        For each text, a choice of each router.

    Raises:
        DeviceError: the runtime does not show them.
    """
    if calls is None and not session.has_all_positions:
        calls = [[1] * len(text) for text in texts]
    names = found.whole if calls is None else found.shipped
    if len(names) != len(routers):
        raise DeviceError(f"its files have {len(names)} routers, and the program {len(routers)}")
    asked = list(dict.fromkeys(name for each in names for name in each.all()))
    shown = session.values(texts, asked, calls)
    return [
        _choices(names, routers, values, len(text))
        for text, values in zip(texts, shown, strict=True)
    ]


def _choices(
    names: Sequence[RouterNames], routers: Sequence[fx.Node], values: Shown, tokens: int
) -> list[Choice]:
    missing = [name for each in names for name in each.all() if name not in values]
    if missing:
        raise DeviceError(f"the runtime does not show the value of {missing[0]}")
    rows = []
    for each, node in zip(names, routers, strict=True):
        experts = int(shape_of(node)[-1])
        width = _chosen(node) if each.experts else experts
        index_width = width // max(1, len(each.experts))
        logits = [_rows(array, experts) for array in values[each.logits]]
        weights = [_rows(array, width) for array in values[each.weights]]
        indices = [[_rows(a, index_width) for a in values[name]] for name in each.experts]
        sets = [
            _sets(node, logits[at], weights[at], [each[at] for each in indices])
            for at in range(len(logits))
        ]
        rows.append(sets)
    # A router of the last layer sees the last token of a call alone.
    sizes = [max(each[at].shape[1] for each in rows) for at in range(len(rows[0]))]
    if sum(sizes) != tokens:
        raise DeviceError(f"the runtime shows the choices of {sum(sizes)} of {tokens} tokens")
    return [_joined(each, sizes) for each in rows]


def _chosen(node: fx.Node) -> int:
    """How many experts a token has."""
    count = node.args[1] if node.target is dialect.ROUTE else 2
    assert isinstance(count, int)
    return count


def _joined(parts: Sequence[Tensor], sizes: Sequence[int]) -> Choice:
    """The choices of all calls of a text."""
    kinds, _, experts = parts[0].shape
    total, done = sum(sizes), 0
    sets = torch.zeros(kinds, total, experts, dtype=torch.bool)
    known = torch.zeros(total, dtype=torch.bool)
    for part, size in zip(parts, sizes, strict=True):
        done += size
        count = part.shape[1]
        if count not in (1, size):
            raise DeviceError(f"the runtime shows {count} tokens of a call with {size}")
        sets[:, done - count : done] = part
        known[done - count : done] = True
    return Choice(sets, known)


def _rows(array: npt.NDArray[np.float32], width: int) -> Tensor:
    """A value of an artifact as ``float32[t, width]``."""
    shape = array.shape
    if len(shape) == 4 and shape[1:3] == (width, 1):  # channels first, for the Neural Engine
        array = array.reshape(width, -1).T
    elif shape[-1] != width:
        raise DeviceError(f"the runtime shows a router's value in the shape {list(shape)}")
    return torch.from_numpy(np.ascontiguousarray(array.reshape(-1, width), np.float32))


def _sets(node: fx.Node, logits: Tensor, weights: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """What a router chose in one call, as `Choice.sets`."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    if node.target is dialect.ROUTE:
        if indices:
            chosen = torch.cat([each.long() for each in indices], -1)
            return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)[None]
        return _filled(weights != 0, order, node)[None]
    if indices:
        first, second = (each.long() for each in indices)
        own = weights
    else:
        chosen = weights != 0
        # Of the two the first has the larger logit.
        ranked = chosen.gather(-1, order).float()
        places = ranked.topk(2, -1).indices.sort(-1).values
        first, second = order.gather(-1, places).tensor_split(2, -1)
        own = torch.cat([weights.gather(-1, each) for each in (first, second)], -1)
    found = []
    left = logits
    for index, share in zip((first, second), own.tensor_split(2, -1), strict=True):
        found += [_marked(logits, index), _candidates(left, index, share)]
        left = left.scatter(-1, index, -torch.inf)
    return torch.stack(found)


def _filled(chosen: Tensor, order: Tensor, node: fx.Node) -> Tensor:
    """Adds the experts whose share is rounded to 0, the largest first."""
    missing = (_chosen(node) - chosen.sum(-1, keepdim=True)).clamp_min(0)
    if not bool(missing.any()):
        return chosen
    free = ~chosen.gather(-1, order)
    wanted = free & (free.cumsum(-1) <= missing)
    return chosen | torch.zeros_like(chosen).scatter(-1, order, wanted)


def _candidates(left: Tensor, index: Tensor, share: Tensor) -> Tensor:
    """SparseMixer's candidates: as many of the largest logits as explain the chosen one's share.

    They are told by the share and not by the distances: a runtime's float16 may put a distance that
    is near the bound on either side of it.
    """
    order = torch.sort(left, dim=-1, descending=True, stable=True).indices
    ranked = left.gather(-1, order)
    powers = (ranked - ranked[:, :1]).exp()
    own = left.gather(-1, index).sub(ranked[:, :1]).exp()
    number = (own / powers.cumsum(-1) - share).abs().argmin(-1, keepdim=True)
    kept = torch.arange(left.shape[-1])[None] <= number
    return torch.zeros_like(left, dtype=torch.bool).scatter(-1, order, kept) | _marked(left, index)


def _marked(logits: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
