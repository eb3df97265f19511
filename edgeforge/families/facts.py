"""What targets are told of a model, and the context that an artifact declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from edgeforge.errors import UsageError
from edgeforge.families.spec import LayerSpec, ModelSpec, convolved_columns
from exporters.recurrence_size import RecurrenceSize
from exporters.target import ModelFacts

DEFAULT_CONTEXT: Final = 4096
"""A longer context must be asked for: its caches and rotary tables cost memory on the phone."""

LONGEST_CONTEXT: Final = 1 << 20
"""The longest that a model may declare whose states do not grow with the text."""


def facts_of(spec: ModelSpec, context: int, adapter_numbers: int = 0) -> ModelFacts:
    """Returns what targets need to know about a model.

    Args:
        spec: the model's dimensions.
        context: declared context in tokens.
        adapter_numbers: numbers of the factors of all adapters that lie beside the weights.
    """
    return ModelFacts(
        model_type=spec.model_type,
        hidden_size=spec.hidden_size,
        head_dim=spec.head_dim,
        num_heads=tuple(layer.num_heads for layer in spec.layers),
        num_kv_heads=tuple(layer.num_kv_heads for layer in spec.layers),
        bos=spec.bos,
        eos=spec.eos,
        pad=spec.pad,
        context=context,
        rope_width=sum(rope.width for rope in spec.ropes),
        recent=sum(recent_numbers(spec, layer) for layer in spec.layers),
        memory=sum(
            layer.recurrence.memory for layer in spec.layers if layer.recurrence is not None
        ),
        recurrences=tuple(dict.fromkeys(recurrence_sizes(spec))),
        adapter_numbers=adapter_numbers,
        attention_softcap=spec.attention_softcap,
        experts=max((max(each.experts, each.attention_experts) for each in spec.layers), default=0),
        chosen_experts=max(
            (max(each.chosen_experts, each.chosen_attention_experts) for each in spec.layers),
            default=0,
        ),
    )


def recurrence_sizes(spec: ModelSpec) -> Iterator[RecurrenceSize]:
    """Yields the dimensions of the recurrence of each layer that has one."""
    for layer in spec.layers:
        made = layer.recurrence
        if made is not None:
            yield RecurrenceSize(
                made.heads,
                made.key_heads,
                made.key_width,
                made.value_width,
                by_row=layer.mixer == "time_mix",
                replaces=layer.mixer == "delta_net",
            )


def recent_numbers(spec: ModelSpec, layer: LayerSpec) -> int:
    """Returns how many numbers a layer keeps of the last few tokens."""
    shifted = spec.hidden_size if layer.feed_forward == "channel_mix" else 0
    if layer.mixer == "time_mix":
        return spec.hidden_size + shifted
    return convolved_columns(spec, layer) * max(0, spec.conv_width - 1) + shifted


def choose_context(spec: ModelSpec, asked: int | None) -> int:
    """Returns the declared context in tokens: ``asked``, or the model's up to `DEFAULT_CONTEXT`.

    Raises:
        UsageError: ``asked`` is under 2 or longer than the model can have.
    """
    if asked is None:
        return min(spec.max_context, DEFAULT_CONTEXT)
    longest = longest_context(spec)
    if not 2 <= asked <= longest:
        raise UsageError(
            f"--context {asked} is not possible: this model takes 2 to {longest} tokens"
        )
    return asked


def longest_context(spec: ModelSpec) -> int:
    """Returns the longest context that an artifact of the model may declare, tokens.

    A model without attention has states of a fixed size, and runs past the texts it was trained on.
    """
    return spec.max_context if spec.attends else max(spec.max_context, LONGEST_CONTEXT)
