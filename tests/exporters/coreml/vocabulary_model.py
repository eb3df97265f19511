"""Tiny models that use the whole vocabulary, each exported from random weights without a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from edgeforge.families.assembly import assemble, bias, convolution, matrix, norm
from edgeforge.families.facts import facts_of
from edgeforge.families.spec import LayerSpec, ModelSpec, RopeSpec, WeightSpec
from edgeforge.model.trace import trace
from exporters.coreml.target import CoremlTarget
from exporters.lifted import Value
from exporters.options import TargetOptions
from exporters.target import ExportRequest
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.program.dialect import check_float, check_quantized
from quant.program.program import Input, Program
from quant.program.rewrite import quantize_program
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore
from tests.oracles.traced import ReferenceSession

HIDDEN, WIDTH, FFN, VOCAB, CONTEXT = 32, 8, 40, 50, 48
# A window with a partial rotation of its own, no rotation, another table for queries, and a
# convolution.
LAYERS = (
    LayerSpec(4, 2, FFN, window=7, rope=1),
    LayerSpec(4, 2, FFN, rope=None),
    LayerSpec(3, 1, FFN, rope=0, query_rope=2),
    LayerSpec(0, 0, FFN, mixer="short_conv"),
)
ROPES = (RopeSpec(1e4, WIDTH), RopeSpec(1e2, 4), RopeSpec(1e3, WIDTH))


def spec(layers: tuple[LayerSpec, ...] = LAYERS, *, biases: bool = True, **changes) -> ModelSpec:
    """A model of these layers with every kind of weight; changes are fields of `ModelSpec`."""
    asked: dict[str, object] = {
        "norm": "layer",
        "block": "sandwich",
        "activation": "gelu_tanh",
        "attention_scale": 0.3,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "clip_qkv": 2.0,
        "embedding_multiplier": 5.66,
        "residual_multiplier": 0.22,
        "logit_multiplier": 0.3,
        "conv_width": 3,
        "gated": True,
        **changes,
    }
    block, gated = str(asked["block"]), bool(asked["gated"])

    def layer_weights(index: int, layer: LayerSpec) -> dict[str, WeightSpec]:
        made: dict[str, WeightSpec] = {}

        def product(name: str, columns: int, rows: int) -> None:
            made[name] = matrix("linear", columns, (f"{index}.{name}", rows))
            if biases:
                made[f"{name}.bias"] = bias((f"{index}.{name}.bias", rows))

        def scale(name: str, width: int) -> None:
            made[name] = norm(f"{index}.{name}", width, added=1)

        if layer.mixer == "attention":
            q, kv = layer.num_heads * WIDTH, layer.num_kv_heads * WIDTH
            product("self_attn.qk_proj", HIDDEN, q + kv)
            product("self_attn.v_proj", HIDDEN, kv)
            whole = index == 0  # the first layer's norms are as wide as all heads
            scale("self_attn.q_norm", q if whole else WIDTH)
            scale("self_attn.k_norm", kv if whole else WIDTH)
            product("self_attn.o_proj", q, HIDDEN)
        else:
            product("conv.in_proj", HIDDEN, 3 * HIDDEN)
            made["conv.conv"] = convolution(f"{index}.conv", HIDDEN, 3)
            made["conv.conv.bias"] = bias((f"{index}.conv.bias", HIDDEN))
            product("conv.out_proj", HIDDEN, HIDDEN)
        names = {
            "pre": ("input_layernorm", "post_attention_layernorm"),
            "parallel": ("input_layernorm",),
            "post": ("attention_output_norm", "mlp_output_norm"),
        }
        for name in names.get(block, (*names["pre"], *names["post"])):
            scale(name, HIDDEN)
            if biases and asked["norm"] == "layer":
                made[f"{name}.bias"] = bias((f"{index}.{name}.bias", HIDDEN))
        up = "mlp.gate_up_proj" if gated else "mlp.up_proj"
        product(up, HIDDEN, 2 * layer.ffn_width if gated else layer.ffn_width)
        product("mlp.down_proj", layer.ffn_width, HIDDEN)
        return made

    final = {"weight": norm("n", HIDDEN)} if biases or asked["norm"] == "rms" else {}
    return ModelSpec(
        "vocabulary",
        HIDDEN,
        WIDTH,
        VOCAB,
        layers,
        1e-5,
        ROPES,
        True,
        CONTEXT,
        None,
        (),
        None,
        assemble(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            layers=layers,
            layer_weights=layer_weights,
            embedding="e",
            final_norm=final,
            head=None,
            head_bias="head.bias" if biases else None,
        ),
        **asked,
    )


class _Random:
    """Random weights, rounded to bfloat16 as checkpoints are."""

    def __init__(self, made: ModelSpec, size: float, larger: Mapping[str, float]) -> None:
        draw = torch.Generator().manual_seed(3)
        self.made, self.values = made, {}
        for name, weight in made.weights.items():
            value = torch.randn(weight.shape, generator=draw) * size
            if weight.role == "norm":
                value = value * 0.1 / size + 1
            elif weight.role in ("linear", "head", "gate"):
                value = value / weight.shape[1] ** 0.5
            if weight.form == "negative_exponential":
                value = -value.exp()
            for end, times in larger.items():
                value = value * times if name.endswith(end) else value
            self.values[name] = value.bfloat16().float()

    def shapes(self):
        return {name: weight.shape for name, weight in self.made.weights.items()}

    def pieces(self, name):
        shape = self.made.weights[name].shape
        return [(name, 1 if len(shape) == 1 else shape[0])]

    def read_rows(self, name, start, stop):
        value = self.values[name]
        return value.reshape(-1, value.shape[-1])[start:stop]


@dataclass(frozen=True)
class Made:
    """A package and what it was made of."""

    folder: Path
    program: Program
    store: WeightStore

    def reference(self) -> ReferenceSession:
        """Runs the program by its own operators, with the store's weights in float32."""
        from edgeforge.reference.walk import store_reader

        read = store_reader(self.store)
        stored = {"codes", "scale", "zero_point", "lut"}

        def part(given: Input) -> torch.Tensor:
            return self.store.part(given.name, given.part) if given.part in stored else read(given)

        return ReferenceSession(self.program, part)


def made(
    folder: Path,
    asked: ModelSpec,
    *,
    format: str = "fp32",
    size: float = 1.0,
    larger: Mapping[str, float] | None = None,
    **options: object,
) -> Made:
    """Exports a model of random weights.

    Args:
        folder: an empty folder.
        asked: the model.
        format: the format of every matrix.
        size: how large the weights are.
        larger: how many times larger some are, by the ends of their names.
        options: the target's options.
    """
    given = TargetOptions(**{"chunk": "16", **options})
    program, source = trace(asked, CONTEXT), _Random(asked, size, larger or {})
    check_float(program)
    chosen = parse_format(format)
    plain = Assignment(parse_format("fp32"), "cast")
    matrices = Assignment(chosen, "rtn" if format.startswith("int") else "cast")
    plan = QuantPlan(
        format,
        {
            name: matrices if weight.role in ("embedding", "linear", "head") else plain
            for name, weight in asked.weights.items()
        },
    )
    key = "a" * 40
    with new_store(folder / "store", key, plan, source.shapes()) as writer:
        fill_store(source, plan, writer)
    store = WeightStore(folder / "store" / key)
    quantized = quantize_program(program, plan)
    check_quantized(quantized)
    target, facts = CoremlTarget(), facts_of(asked, CONTEXT)
    target.check(plan, source.shapes(), facts, given)
    out = folder / "artifact"
    out.mkdir()
    target.write(ExportRequest(quantized, store, facts, options=given), out)
    return Made(out, quantized, store)


def values_of(root: Value) -> list[Value]:
    """All values that a result depends on."""
    found: dict[int, Value] = {}
    left = [root]
    while left:
        value = left.pop()
        if id(value) in found:
            continue
        found[id(value)] = value
        for field in fields(value):
            inner = getattr(value, field.name)
            left += [each for each in (inner if isinstance(inner, tuple) else [inner])
                     if isinstance(each, Value)]  # fmt: skip
    return list(found.values())
