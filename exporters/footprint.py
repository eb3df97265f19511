"""Estimates the memory that a model takes on a device, before any work is done.

An estimate counts what a runtime keeps: every weight once, a tied embedding as often as the runtime
holds it, caches filled to the context (those of layers that have them: a window masks tokens, but
no runtime keeps fewer for it), and the buffers of one run of a prompt. It leaves out the
runtime's own code, the process around it, and pages of the weight file that the system may drop.
Llama-3.2-1B's shape at int4-g128 with a context of 4096 took 1.05 GB of anonymous and locked pages
in ExecuTorch, where this says 1.06 GB. The demo model at int4, whose weights are fewer than the
code that runs them, grew a process by 19 MB there and by 25 MB in ONNX Runtime, where this says
8 MB and 12 MB.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporters.errors import MemoryRefused
from exporters.runtime_memory import Footprint, RuntimeCosts
from exporters.target import ModelFacts
from quant.formats.formats import IntFormat
from quant.plans.plan import QuantPlan, matrix_shape

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOAT = 4


def estimate(
    plan: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    facts: ModelFacts,
    costs: RuntimeCosts,
) -> Footprint:
    """Estimates the memory that a model takes in a runtime.

    Args:
        plan: the format of every weight.
        shapes: the shape of every weight.
        facts: the numbers of heads and their width.
        costs: how the runtime keeps what it loads.
    """
    weights, stored, widest = 0, 0, 0
    for name, assignment in plan.weights.items():
        rows, columns = matrix_shape(shapes[name])
        size = assignment.format.nbytes(rows, columns)
        tied = name == _EMBEDDING and _HEAD not in shapes
        stored += size * (costs.stored_copies if tied else 1)
        if not isinstance(assignment.format, IntFormat) and costs.float_element is not None:
            size = rows * columns * costs.float_element
        weights += size * (costs.tied_copies if tied else 1)
        if name not in (_EMBEDDING, _HEAD):
            widest = max(widest, rows)
    # The queries of all experts that a token chose are wider than one expert's product.
    widest = max(widest, facts.head_dim * max(facts.num_heads))
    vocab = shapes[_EMBEDDING][0]
    # Three hidden vectors (the residual stream, its norm, attention's result), the widest
    # product and its two halves, for every token of a run; logits of one token.
    run = costs.run_tokens * (3 * facts.hidden_size + 2 * widest) + vocab
    if facts.experts:
        # Of a mixture an expert's tokens, their results, and the sum so far; and weights of the
        # experts, of which a router holds as many again.
        run += costs.run_tokens * (3 * facts.hidden_size + 2 * facts.experts)
        rows = costs.expert_rows * facts.chosen_experts
        run += costs.run_tokens * rows * facts.hidden_size
    run += max(
        (
            costs.run_tokens * each.operands + costs.recurrence(each, costs.run_tokens)
            for each in facts.recurrences
        ),
        default=0,
    )
    scores = costs.run_tokens * max(facts.num_heads) if costs.scores else 0
    tables = facts.head_dim if facts.rope_width is None else facts.rope_width
    return Footprint(
        weights=weights,
        buffers=run * _FLOAT,
        caches_per_token=2 * sum(facts.num_kv_heads) * facts.head_dim * costs.cache_element,
        buffers_per_token=(tables + scores) * _FLOAT,  # cosines and sines
        states=facts.recent * costs.state_element + facts.memory * costs.memory_element,
        stored=stored,
        run_tokens=costs.run_tokens,
        adapters=facts.adapter_numbers * costs.adapter_element,
    )


def check_memory(
    target: str,
    footprint: Footprint,
    context: int,
    memory: int | None,
    *,
    note: str = "",
) -> None:
    """Refuses a context that does not fit the stated memory.

    Args:
        target: the target's name, for the message.
        footprint: the memory that the model takes.
        context: the declared context, in tokens.
        memory: bytes that the device has for the model; None when the user states no limit.
        note: other advice, appended to the message.

    Raises:
        MemoryRefused: says how much memory is needed, and the largest context that fits.
    """
    if memory is None or footprint.total(context) <= memory:
        return
    beside = f"adapters {_text(footprint.adapters)}, " if footprint.adapters else ""
    parts = (
        f"weights {_text(footprint.weights)}, {beside}caches "
        f"{_text(footprint.caches_at(context))}, buffers {_text(footprint.buffers_at(context))}"
    )
    largest = footprint.largest_context(memory)
    if footprint.weights > memory:
        cure = "not even its weights fit: choose a recipe of fewer bits"
    elif largest < 2:
        cure = "its weights and buffers leave no room for a context: choose a recipe of fewer bits"
    else:
        cure = f"export with --context {largest} or less"
    raise MemoryRefused(
        f"{target} would need {_text(footprint.total(context))} for a context of {context} tokens "
        f"({parts}), and --max-memory is {_text(memory)}: {cure}{note}",
        largest,
    )


def _text(size: float) -> str:
    """A number of bytes in MB or GB (powers of ten), for messages.

    >>> _text(1_234_000_000), _text(5_600_000)
    ('1.23 GB', '5.6 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
