"""The places of a model whose values are compared: in the program, and in an artifact's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgeforge.verification.meaning.attending import Attending
from edgeforge.verification.meaning.chains import NoDecoderError, plain
from edgeforge.verification.meaning.decoder import Decoder, Mixer, decoder_of
from edgeforge.verification.meaning.head_mixture import HeadMixture
from edgeforge.verification.meaning.recurring import Recurring, operands
from edgeforge.verification.meaning.registry import READERS
from exporters.lifted import Linear
from exporters.manifest import Manifest
from quant.program import dialect
from quant.program.expert_branches import mixture_of
from quant.program.program import Program, node_argument

Part = Literal["attention", "convolution", "recurrence", "layer"]
_PRODUCTS = (dialect.LINEAR, dialect.QUANT_LINEAR)
# The last products of mixers that are no attention, by the ends of their weights' names.
_LAST: Final[dict[str, Part]] = {
    ".conv.out_proj.weight": "convolution",
    ".linear_attn.out_proj.weight": "recurrence",
    ".mamba.out_proj.weight": "recurrence",
    ".time_mix.output_proj.weight": "recurrence",
}
# The last products of dense feed-forward parts and of RWKV's mixes of channels.
_FED: Final = (".mlp.down_proj.weight", ".mlp.value_proj.weight")


@dataclass(frozen=True, order=True)
class Point:
    """A place in a model.

    Attributes:
        layer: the layer's number, counted from 0.
        part: ``attention``, ``convolution`` or ``recurrence`` for what that gives to its last
            product, ``layer`` for the residual stream after the layer. Of a mixture of attention
            heads, ``attention`` is the sum of its experts' outputs: in which order a token's
            experts stand before it is a file's own choice.
    """

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"layer {self.layer}" + ("" if self.part == "layer" else f", {self.part}")


def program_points(program: Program) -> dict[fx.Node, Point]:
    """Returns the calls of a program that compute the points, in the program's order."""
    found: dict[fx.Node, Point] = {}
    layer = 0
    heads = _head_mixtures(program)
    for node in program.graph.nodes:
        if node.target is dialect.ATTENTION:
            if node not in heads.values():
                found[node] = Point(layer, "attention")
        elif node in heads:
            found[node] = Point(layer, "attention")
        elif node.target in _PRODUCTS and _weight(program, node).endswith(tuple(_LAST)):
            before = node_argument(node, 0)
            while before.target in dialect.ROUNDINGS:
                before = node_argument(before, 0)
            found[before] = Point(layer, _part(_weight(program, node)))
        elif node.target is dialect.COMBINE:
            after = _added(node)
            if _adds_shared(program, after):
                after = _added(after)
            found[after] = Point(layer, "layer")
            layer += 1
        elif node.target in _PRODUCTS and _weight(program, node).endswith(_FED):
            found[_added(node)] = Point(layer, "layer")
            layer += 1
    return found


def _head_mixtures(program: Program) -> dict[fx.Node, fx.Node]:
    """The sums of attention's experts, and the attention whose result each is made of."""
    mixtures = [mixture_of(n) for n in program.graph.nodes if n.target is dialect.COMBINE]
    return {each.combine: each.source for each in mixtures if each.reads_slots}


def _part(weight: str) -> Part:
    return next(part for end, part in _LAST.items() if weight.endswith(end))


def _added(node: fx.Node) -> fx.Node:
    """The addition that reads a result, directly or after something else was made of it."""
    after = next(iter(node.users))
    # A dialect of activations may round a result once more before it is added.
    while after.target is not dialect.ADD:
        after = next(iter(after.users))
    return after


def _adds_shared(program: Program, added: fx.Node) -> bool:
    """Whether an addition adds what an expert of all tokens computed, gated or not."""
    queue = list(added.all_input_nodes)
    while queue:
        node = queue.pop()
        if node.target in _PRODUCTS:
            if _weight(program, node).endswith(".shared_expert.down_proj.weight"):
                return True
        elif node.target is dialect.MUL:
            queue += node.all_input_nodes
    return False


def _weight(program: Program, node: fx.Node) -> str:
    return program.inputs[node_argument(node, 1).name].name


@dataclass(frozen=True)
class ArtifactPoints:
    """The points of an artifact's entry point that computes all positions.

    Attributes:
        names: each point's value, as the files name it.
        heads: of each layer's attention: query heads, key/value heads, width of a head; zeros where
            the mixer's point is no attention's own result.
        why_none: why there are none; empty where there are.
    """

    names: dict[Point, str]
    heads: tuple[tuple[int, int, int], ...]
    why_none: str = ""


def artifact_points(folder: Path, manifest: Manifest) -> ArtifactPoints:
    """Reads from an artifact's files which values are the points.

    Raises:
        ExportError: a file is missing or damaged.
    """
    reader = READERS.get(manifest.target)
    if reader is None:
        return ArtifactPoints({}, (), f"the graphs of the target {manifest.target} are not read")
    reading = reader(folder, manifest)
    decoders: list[Decoder] = []
    why = "; ".join(reading.unread)
    for entry in reading.entry_points:
        try:
            decoders.append(decoder_of(entry.logits))
        except NoDecoderError as error:
            why = f"{entry.name} is not the decoder that EdgeForge writes: {error}"
    # The entry point that computes all positions is the last; a stripped artifact has none.
    whole = [decoder for decoder in decoders if not decoder.last] or decoders
    if not whole:
        return ArtifactPoints({}, (), why or "there is no entry point")
    names: dict[Point, str] = {}
    for index, layer in enumerate(whole[-1].layers):
        if isinstance(layer.mixer, Attending):
            names[Point(index, "attention")] = layer.mixer.attention.name
        elif isinstance(layer.mixer, HeadMixture):
            names[Point(index, "attention")] = layer.mixer.combine.name
        elif isinstance(layer.mixer, Recurring):
            last = plain(layer.mixer.result)
            while not isinstance(last, Linear):  # a bias may follow the product
                last = plain(operands(last)[0])
            names[Point(index, "recurrence")] = plain(last.source).name
        else:
            names[Point(index, "convolution")] = plain(layer.mixer.out.source).name
        names[Point(index, "layer")] = layer.result.name
    return ArtifactPoints(names, tuple(_heads(layer.mixer) for layer in whole[-1].layers))


def _heads(mixer: Mixer) -> tuple[int, int, int]:
    return mixer.attention.heads if isinstance(mixer, Attending) else (0, 0, 0)


def arranged(
    arrays: Sequence[npt.NDArray[np.float32]], width: int, heads: tuple[int, int, int]
) -> Tensor | None:
    """Puts a value of an artifact into the program's layout.

    Args:
        arrays: one for each call, in a target's layout.
        width: how many numbers a token has.
        heads: query heads, key/value heads and width of a head; for attention's results.

    Returns:
        ``float32[tokens, width]``; None for a layout that is not known.
    """
    rows = [_rows(array, width, heads) for array in arrays]
    if any(each is None for each in rows):
        return None
    return torch.from_numpy(np.concatenate([each for each in rows if each is not None]))


def _rows(
    array: npt.NDArray[np.float32], width: int, heads: tuple[int, int, int]
) -> npt.NDArray[np.float32] | None:
    queries, keys, size = heads
    shape = array.shape
    if array.size % width:
        return None
    if shape[-1] == width:
        return array.reshape(-1, width)
    if len(shape) == 4 and shape[1:3] == (
        width,
        1,
    ):  # channels first, as the Neural Engine has them
        return array.reshape(width, -1).T
    if len(shape) == 4 and shape[2:] == (queries, size) and shape[1] != keys:
        return array.reshape(-1, width)
    if (
        len(shape) == 4
        and (shape[1], shape[3]) == (keys, size)
        and not shape[2] % (queries // keys)
    ):
        groups = queries // keys
        split = array.reshape(keys, groups, -1, size)
        return split.transpose(2, 0, 1, 3).reshape(-1, width)
    if len(shape) == 4 and shape[2:] == (queries, size):
        return array.reshape(-1, width)
    if len(shape) == 4 and (shape[1], shape[3]) == (queries, size):
        return array.reshape(queries, -1, size).transpose(1, 0, 2).reshape(-1, width)
    return None
