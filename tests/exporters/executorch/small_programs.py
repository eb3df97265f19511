"""Artifacts of specs that no family has: random weights, and the logits that torch gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from edgeforge.families.assembly import assemble, bias, convolution, matrix, norm
from edgeforge.families.facts import facts_of
from edgeforge.families.spec import LayerSpec, ModelSpec, RopeSpec
from edgeforge.model.trace import trace
from exporters.executorch.target import ExecutorchTarget
from exporters.options import TargetOptions
from exporters.target import ExportRequest, Lowered
from quant.formats.formats import FloatFormat, parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.program import dialect
from quant.program.program import Program
from quant.program.rewrite import quantize_program
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore

HIDDEN, HEAD_DIM, FFN, VOCAB, CONTEXT = 64, 16, 96, 80, 48
KEY = "b" * 40


def spec(
    *layers: LayerSpec,
    biases: bool = False,
    wide_qk_norm: bool = False,
    norm_bias: bool = False,
    norm_weight: bool = True,
    ropes: tuple[RopeSpec, ...] = (RopeSpec(1e4, HEAD_DIM),),
    tied: bool = True,
    **fields: object,
) -> ModelSpec:
    """A spec whose map of weights has what its fields ask for."""
    gated = bool(fields.get("gated", True))
    block = fields.get("block", "pre")

    def norms(name: str, width: int = HIDDEN) -> dict:
        found = {name: norm(name, width)} if norm_weight else {}
        return found | ({f"{name}.bias": bias((f"{name}.b", width))} if norm_bias else {})

    def product(name: str, columns: int, rows: int) -> dict:
        found = {name: matrix("linear", columns, (name, rows))}
        return found | ({f"{name}.bias": bias((f"{name}.b", rows))} if biases else {})

    def weights(index: int, layer: LayerSpec) -> dict:
        if layer.mixer == "attention":
            q, k = layer.num_heads * HEAD_DIM, layer.num_kv_heads * HEAD_DIM
            found = product("self_attn.qk_proj", HIDDEN, q + k)
            found |= product("self_attn.v_proj", HIDDEN, k)
            if wide_qk_norm:
                found |= {"self_attn.q_norm": norm("q", q), "self_attn.k_norm": norm("k", k)}
            found |= product("self_attn.o_proj", q, HIDDEN)
        else:
            found = product("conv.in_proj", HIDDEN, 3 * HIDDEN)
            found["conv.conv"] = convolution("conv", HIDDEN, int(str(fields["conv_width"])))
            if biases:
                found["conv.conv.bias"] = bias(("conv.b", HIDDEN))
            found |= product("conv.out_proj", HIDDEN, HIDDEN)
        places = {
            "pre": ("input_layernorm", "post_attention_layernorm"),
            "sandwich": (
                "input_layernorm",
                "attention_output_norm",
                "post_attention_layernorm",
                "mlp_output_norm",
            ),
            "post": ("attention_output_norm", "mlp_output_norm"),
            "parallel": ("input_layernorm",),
        }
        for name in places[str(block)]:
            found |= norms(name)
        up = product("mlp.gate_up_proj" if gated else "mlp.up_proj", HIDDEN, FFN * (1 + gated))
        return found | up | product("mlp.down_proj", FFN, HIDDEN)

    last = norms("final")
    return ModelSpec(
        model_type="llama",
        hidden_size=HIDDEN,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        layers=layers,
        norm_eps=1e-5,
        ropes=ropes,
        tied=tied,
        max_context=4096,
        bos=None,
        eos=(),
        pad=None,
        weights=assemble(
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            layers=layers,
            layer_weights=weights,
            embedding="embedding",
            final_norm={
                "weight" if name == "final" else "bias": weight for name, weight in last.items()
            },
            head=None if tied else "head",
            head_bias="head.b" if biases and not tied else None,
        ),
        **fields,
    )


class Source:
    """Random weights held in memory; no two tests of one spec differ."""

    def __init__(self, spec: ModelSpec) -> None:
        draw = torch.Generator().manual_seed(len(spec.weights))
        self.weights = {}
        for name, weight in spec.weights.items():
            found = torch.randn(weight.shape, generator=draw)
            if weight.role == "norm":
                found = 1 + 0.1 * found
            elif weight.role == "bias":
                found = 0.3 * found
            elif len(weight.shape) == 2:
                found = found * weight.shape[1] ** -0.5 * (1 if weight.role == "conv" else 2)
            self.weights[name] = found

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def pieces(self, name: str) -> list[tuple[str, int]]:
        weight = self.weights[name]
        return [(name, 1 if weight.ndim == 1 else len(weight))]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        weight = self.weights[name]
        return weight.reshape(-1, weight.shape[-1])[start:stop]


class _Rounding(torch.fx.Interpreter):
    """Runs a graph, with the activations of integer products rounded where that is asked."""

    def __init__(self, module: torch.fx.GraphModule, rounded: bool) -> None:
        super().__init__(module)
        self.rounded = rounded

    def call_function(self, target, args, kwargs):
        if self.rounded and target is dialect.QUANT_LINEAR:
            args = (torch.ops.edgeforge.round_per_token(args[0]), *args[1:])
        return super().call_function(target, args, kwargs)


@dataclass(frozen=True)
class Made:
    """An artifact, and the program and store that it was made of."""

    folder: Path
    program: Program
    store: WeightStore
    lowered: Lowered

    def logits(self, tokens: torch.Tensor, *, rounded: bool = False) -> torch.Tensor:
        """What torch gives for a whole text from position 0 on: ``float32[t, vocab]``.

        Args:
            tokens: the text, ``int64[t]``.
            rounded: whether products with integers round each token's activations, as XNNPACK's do.
        """
        given = []
        module = _Rounding(torch.fx.GraphModule(torch.nn.Module(), self.program.graph), rounded)
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            what, fake = self.program.inputs[node.name], node.meta["val"]
            match what.kind:
                case "tokens":
                    given.append(tokens[None])
                case "position":
                    given.append(torch.zeros(1, dtype=torch.int64))
                case "weight":
                    part = self.store.part(what.name, what.part)
                    given.append(part.reshape(fake.shape))
                case "table":
                    given.append(self.program.tables[what.name])
                case _:  # what a state holds before a text must not matter
                    given.append(torch.full(tuple(fake.shape), torch.nan))
        with torch.no_grad():
            result = module.run(*given)
        return (result[0] if isinstance(result, tuple | list) else result)[0]


def make(
    spec: ModelSpec, folder: Path, format: str = "fp32", context: int = CONTEXT, **options: object
) -> Made:
    """Exports a spec with random weights, whose matrices all have one format."""
    source = Source(spec)
    chosen = parse_format(format)
    weights = {}
    for name, weight in spec.weights.items():
        whole = weight.role in ("norm", "bias", "conv")
        form = parse_format("fp32") if whole else chosen
        weights[name] = Assignment(form, "cast" if isinstance(form, FloatFormat) else "rtn")
    plan = QuantPlan("mine", weights)
    folder.mkdir(parents=True, exist_ok=True)
    with new_store(folder / "store", KEY, plan, source.shapes()) as writer:
        fill_store(source, plan, writer, threads=1)
    store = WeightStore(folder / "store" / KEY)
    program = quantize_program(trace(spec, context), plan)
    facts = facts_of(spec, context)
    asked = TargetOptions(**options)
    target = ExecutorchTarget()
    target.check(plan, source.shapes(), facts, asked)
    out = folder / "artifact"
    out.mkdir()
    lowered = target.write(ExportRequest(program, store, facts, options=asked), out)
    return Made(out, program, store, lowered)
