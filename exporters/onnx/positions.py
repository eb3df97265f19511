"""Emits whole numbers about a call: positions, lengths, and the places of tokens."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from exporters.onnx.graph import GraphBuilder


def emit_positions(builder: GraphBuilder, attends: bool = True) -> None:
    """Emits the sequence lengths that the attention kernel takes, from the attention mask.

    The kernel attends to a row's first tokens, as many as its length says, so a row can be padded
    on the right alone. A row that is padded on the left gets the length 0, which the kernel refuses
    with an error; counting its tokens would attend to the padding without a word.

    Args:
        builder: the graph.
        attends: whether the kernel is in the graph. Where it is not, such a row gets a length far
            below 0, so that looking up its last tokens is the error.
    """
    axis = builder.constant("axis_1", np.array([1], np.int64))
    one = builder.constant("one", np.array(1, np.int64))
    zero = builder.constant("zero", np.array(0, np.int64))
    builder.node("ReduceSum", ["attention_mask", axis], "mask_sum", keepdims=0)
    builder.node("Gather", ["attention_mask", zero], "first_is_attended", axis=1)
    if not attends:
        none = builder.constant("no_length", np.array(-(1 << 40), np.int64))
        builder.node("Equal", ["first_is_attended", zero], "first_is_padding")
        builder.node("Where", ["first_is_padding", none, "mask_sum"], "attended")
        return
    builder.node("Mul", ["mask_sum", "first_is_attended"], "attended")
    builder.node("Sub", ["attended", one], "attended_less_one")
    builder.node("Cast", ["attended_less_one"], "seqlens_k", to=TensorProto.INT32)
    builder.node("Shape", ["attention_mask"], "mask_shape")
    builder.node("Gather", ["mask_shape", one], "total_length_64", axis=0)
    builder.node("Cast", ["total_length_64"], "total_length", to=TensorProto.INT32)


def new_length(builder: GraphBuilder) -> str:
    """Emits how many tokens each row of ``input_ids`` has, padding included: an ``int64``."""
    if not builder.has("new_length"):
        one = builder.constant("one", np.array(1, np.int64))
        builder.node("Shape", ["input_ids"], "ids_shape")
        builder.node("Gather", ["ids_shape", one], "new_length", axis=0)
    return "new_length"


def attended_of_new(builder: GraphBuilder) -> str:
    """Emits how many of each row's new tokens are attended: ``int64[batch]``.

    A first prompt has as many attended tokens as the row is long without its padding. Later tokens
    follow others, and all of them are attended, as the attention kernel demands.
    """
    if not builder.has("attended_of_new"):
        builder.node("Min", ["attended", new_length(builder)], "attended_of_new")
    return "attended_of_new"


def last_token(builder: GraphBuilder) -> str:
    """Emits the place of each row's last attended token among the new: ``int64[batch, 1, 1]``."""
    if not builder.has("last_token"):
        one = builder.constant("one", np.array(1, np.int64))
        axes = builder.constant("axes_1_2", np.array([1, 2], np.int64))
        builder.node("Sub", [attended_of_new(builder), one], "last_of_new")
        builder.node("Unsqueeze", ["last_of_new", axes], "last_token")
    return "last_token"


def position_ids(builder: GraphBuilder) -> str:
    """Emits the new tokens' positions, ``int64[batch, t]``, for rotations outside the kernel.

    They follow the kernel's own rule: a row's first position is the number of attended tokens less
    the number of new tokens, and at least 0, so that a first prompt padded on the right begins
    at 0.
    """
    if not builder.has("position_ids"):
        step = builder.constant("one", np.array(1, np.int64))
        zero = builder.constant("zero", np.array(0, np.int64))
        axis = builder.constant("axis_1", np.array([1], np.int64))
        builder.node("Sub", ["attended", new_length(builder)], "attended_before")
        builder.node("Max", ["attended_before", zero], "past_length")
        builder.node("Unsqueeze", ["past_length", axis], "first_position")
        builder.node("Range", [zero, "new_length", step], "steps")
        builder.node("Add", ["first_position", "steps"], "position_ids")
    return "position_ids"


def begins(builder: GraphBuilder, dimensions: int = 2) -> str:
    """Emits whether each row's text begins with this call: ``bool[batch, 1, 1]``.

    By the same rule, a row begins where no token is attended before the new ones.

    Args:
        builder: the graph.
        dimensions: how many dimensions of 1 follow the rows.
    """
    name = "begins" if dimensions == 2 else f"begins_{dimensions}"
    if not builder.has("row_begins"):
        builder.node("LessOrEqual", ["attended", new_length(builder)], "row_begins")
    if not builder.has(name):
        places = range(1, dimensions + 1)
        axes = builder.integers("axes_" + "_".join(map(str, places)), [*places])
        builder.node("Unsqueeze", ["row_begins", axes], name)
    return name


def any_begins(builder: GraphBuilder) -> str:
    """Emits whether the text of any row begins with this call: ``bool[]``."""
    if not builder.has("any_begins"):
        builder.node("ReduceMin", ["attended"], "least_attended", keepdims=0)
        builder.node("LessOrEqual", ["least_attended", new_length(builder)], "any_begins")
    return "any_begins"


def attended_places(builder: GraphBuilder, late: bool) -> str:
    """Emits which of the new tokens are no padding: ``bool[batch, t, 1]``.

    Args:
        builder: the graph.
        late: whether a place that is none stands before those of the tokens:
            ``bool[batch, 1 + t, 1]``.
    """
    name = "late_is_attended" if late else "is_attended"
    if not builder.has(name):
        first = ("minus_one", -1) if late else ("zero", 0)
        start = builder.constant(first[0], np.array(first[1], np.int64))
        one = builder.constant("one", np.array(1, np.int64))
        axis = builder.constant("axis_1", np.array([1], np.int64))
        last = builder.constant("axis_2", np.array([2], np.int64))
        builder.node("Range", [start, new_length(builder), one], f"{name}_steps")
        builder.node("Unsqueeze", [attended_of_new(builder), axis], f"{name}_count")
        builder.node("Less", [f"{name}_steps", f"{name}_count"], f"{name}_row")
        builder.node("Unsqueeze", [f"{name}_row", last], name)
    return name


def recent_tokens(builder: GraphBuilder, count: int) -> str:
    """Emits the places of each row's last tokens: ``int64[batch, count, 1]``.

    They count in a row of ``count`` tokens from before the call and the new ones, whose padding on
    the right they leave out.
    """
    name = f"last_{count}_tokens"
    if not builder.has(name):
        axis = builder.constant("axis_1", np.array([1], np.int64))
        last = builder.constant("axis_2", np.array([2], np.int64))
        steps = builder.constant(f"steps_{count}", np.arange(count, dtype=np.int64))
        if not builder.has("first_recent"):
            builder.node("Unsqueeze", [attended_of_new(builder), axis], "first_recent")
        builder.node("Add", ["first_recent", steps], f"{name}_rows")
        builder.node("Unsqueeze", [f"{name}_rows", last], name)
    return name


def last_tokens(builder: GraphBuilder, positions: int) -> str:
    """Emits the places of each row's last attended tokens: ``int64[batch, kept, 1]``.

    ``kept`` is ``positions``, or the number of new tokens where there are fewer. A row of a batch
    with fewer attended tokens repeats its first one in front.
    """
    if not builder.has("last_tokens"):
        zero = builder.constant("zero", np.array(0, np.int64))
        one = builder.constant("one", np.array(1, np.int64))
        most = builder.constant("draft_positions", np.array(positions, np.int64))
        axis = builder.constant("axis_1", np.array([1], np.int64))
        axis_2 = builder.constant("axis_2", np.array([2], np.int64))
        attended = attended_of_new(builder)
        builder.node("Min", [new_length(builder), most], "kept_length")
        builder.node("Range", [zero, "kept_length", one], "kept_steps")
        builder.node("Sub", [attended, "kept_length"], "first_kept")
        builder.node("Unsqueeze", ["first_kept", axis], "first_kept_column")
        builder.node("Add", ["first_kept_column", "kept_steps"], "kept_places")
        builder.node("Max", ["kept_places", zero], "kept_of_new")
        builder.node("Unsqueeze", ["kept_of_new", axis_2], "last_tokens")
    return "last_tokens"
