"""The rewrite: what a program looks like before and after, and that its numbers follow."""

from dataclasses import replace

import pytest
import torch
from torch import fx

import quant.program.ops  # noqa: F401
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.program import dialect
from quant.program.dialect import check_float, check_quantized
from quant.program.program import Input, Program
from quant.program.rewrite import quantize_program
from quant.quantizers.rtn import RTN

VOCAB, WIDTH = 20, 64


def build(tied: bool) -> Program:
    """tokens -> embedding -> norm -> linear -> head."""
    graph = fx.Graph()
    inputs: dict[str, Input] = {}

    def placeholder(node_name: str, kind, name: str, value: torch.Tensor) -> fx.Node:
        node = graph.placeholder(node_name)
        node.meta["val"] = value.to("meta")
        inputs[node.name] = Input(kind, name)
        return node

    def call(target, *args) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(1, 3, VOCAB if target is last else WIDTH, device="meta")
        return node

    last = None
    embed = placeholder("p_embed", "weight", "embed", torch.empty(VOCAB, WIDTH))
    norm = placeholder("p_norm", "weight", "norm", torch.empty(WIDTH))
    proj = placeholder("p_proj", "weight", "proj", torch.empty(WIDTH, WIDTH))
    head = embed if tied else placeholder("p_head", "weight", "head", torch.empty(VOCAB, WIDTH))
    tokens = placeholder("tokens", "tokens", "tokens", torch.empty(1, 3, dtype=torch.int64))
    x = call(dialect.EMBEDDING, tokens, embed)
    x = call(dialect.RMS_NORM, x, norm, 1e-6)
    x = call(dialect.LINEAR, x, proj)
    last = dialect.LINEAR
    graph.output((call(dialect.LINEAR, x, head),))
    return Program(graph, inputs, {}, 8, VOCAB)


def rounded(activation: str) -> QuantPlan:
    plain = plan(embed="int8-pc", norm="fp32", proj="int8-pc", head="int8-pc").weights
    return QuantPlan(
        "mine",
        {n: replace(a, activation=activation) for n, a in plain.items() if n != "norm"}
        | {"norm": plain["norm"]},
    )


@pytest.mark.parametrize("activation", ["int8-token", "int8-tensor"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_enters_a_product_is_rounded_before_it(activation, tied):
    result = quantize_program(build(tied), rounded(activation))
    check_quantized(result)
    calls = [line for line in shown(result) if "(" in line]
    head = "embed" if tied else "head"
    if activation == "int8-token":
        proj = last = "round_per_token(x)"
    else:
        proj = "round_per_tensor(x, proj.input_scale)"
        last = f"round_per_tensor(x, {head}.input_scale)"
    assert calls == [
        "quant_embedding(tokens.value, embed.codes, embed.scale, None, 'int8-pc')",
        "rms_norm(x, norm.value, 1e-06)",
        proj,
        "quant_linear(x, proj.codes, proj.scale, None, 'int8-pc')",
        last,
        f"quant_linear(x, {head}.codes, {head}.scale, None, 'int8-pc')",
    ]


def test_products_that_read_the_same_share_a_rounding():
    program = build(tied=False)
    first = next(n for n in program.graph.nodes if n.target is dialect.LINEAR)
    weights = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    with program.graph.inserting_after(first):
        second = program.graph.call_function(dialect.LINEAR, (first.args[0], weights["p_proj"]))
        second.meta["val"] = first.meta["val"]
    with program.graph.inserting_after(second):
        both = program.graph.call_function(dialect.ADD, (first, second))
        both.meta["val"] = first.meta["val"]
    next(n for n in first.users if n is not both).replace_input_with(first, both)
    result = quantize_program(program, rounded("int8-token"))
    check_quantized(result)
    assert sum(n.target is dialect.ROUND_PER_TOKEN for n in result.graph.nodes) == 2


def plan(**formats: str) -> QuantPlan:
    return QuantPlan("mine", {n: Assignment(parse_format(f), "rtn") for n, f in formats.items()})


def shown(program: Program) -> list[str]:
    """The graph as text: placeholders by what they mean, calls by target and arguments."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            given = program.inputs[node.name]
            lines.append(f"{given.kind} {given.name}.{given.part}")
        elif node.op == "call_function":
            arguments = [
                f"{program.inputs[a.name].name}.{program.inputs[a.name].part}"
                if isinstance(a, fx.Node) and a.op == "placeholder"
                else "x"
                if isinstance(a, fx.Node)
                else repr(a)
                for a in node.args
            ]
            name = str(node.target).removeprefix("edgeforge.").removesuffix(".default")
            lines.append(f"{name}({', '.join(arguments)})")
    return lines


def test_a_float_program_becomes_this():
    program = build(tied=False)
    check_float(program)
    result = quantize_program(
        program, plan(embed="int8-pc", norm="fp32", proj="int4-g32-asym", head="fp16")
    )
    check_quantized(result)
    assert shown(result) == [
        "weight embed.codes",
        "weight embed.scale",
        "weight norm.value",
        "weight proj.codes",
        "weight proj.scale",
        "weight proj.zero_point",
        "weight head.value",
        "tokens tokens.value",
        "quant_embedding(tokens.value, embed.codes, embed.scale, None, 'int8-pc')",
        "rms_norm(x, norm.value, 1e-06)",
        "quant_linear(x, proj.codes, proj.scale, proj.zero_point, 'int4-g32-asym')",
        "linear(x, head.value)",
    ]
    shapes = {
        f"{given.name}.{given.part}": (tuple(n.meta["val"].shape), n.meta["val"].dtype)
        for n, given in result.placeholders("weight")
    }
    assert shapes["embed.codes"] == ((VOCAB, WIDTH), torch.uint8)
    assert shapes["embed.scale"] == ((VOCAB, 1), torch.bfloat16)
    assert shapes["proj.codes"] == ((WIDTH, WIDTH // 2), torch.uint8)
    assert shapes["proj.scale"] == ((WIDTH, 2), torch.bfloat16)
    assert shapes["proj.zero_point"] == ((WIDTH, 1), torch.uint8)


def test_few_bits_are_four_or_eight_to_some_bytes():
    result = quantize_program(
        build(tied=True), plan(embed="int2-g32", norm="fp32", proj="int3-g16-asym")
    )
    check_quantized(result)
    assert "quant_linear(x, embed.codes, embed.scale, None, 'int2-g32')" in shown(result)
    shapes = {
        f"{given.name}.{given.part}": tuple(node.meta["val"].shape)
        for node, given in result.placeholders("weight")
    }
    assert shapes["embed.codes"] == (VOCAB, WIDTH // 4)
    assert shapes["proj.codes"] == (WIDTH, WIDTH * 3 // 8)
    assert shapes["proj.zero_point"] == (WIDTH, -(-WIDTH // 16 * 3 // 8))
    looked_up = next(n for n in result.graph.nodes if "quant_embedding" in str(n.target))
    assert looked_up.meta["val"].shape[-1] == WIDTH


def test_a_palette_brings_its_tables():
    result = quantize_program(build(tied=True), plan(embed="lut6-gc4", norm="fp32", proj="lut4-pt"))
    check_quantized(result)
    lines = shown(result)
    assert lines.count("weight embed.codes") == lines.count("weight embed.lut") == 1
    assert "quant_embedding(tokens.value, embed.codes, embed.lut, None, 'lut6-gc4')" in lines
    assert "quant_linear(x, proj.codes, proj.lut, None, 'lut4-pt')" in lines
    assert lines[-1] == "quant_linear(x, embed.codes, embed.lut, None, 'lut6-gc4')"
    shapes = {
        f"{given.name}.{given.part}": (tuple(n.meta["val"].shape), n.meta["val"].dtype)
        for n, given in result.placeholders("weight")
    }
    assert shapes["embed.codes"] == ((VOCAB, WIDTH * 6 // 8), torch.uint8)
    assert shapes["embed.lut"] == ((VOCAB // 4, 64), torch.float16)
    assert shapes["proj.lut"] == ((1, 16), torch.float16)


def test_a_tied_head_shares_its_placeholders():
    result = quantize_program(
        build(tied=True), plan(embed="int4-g32", norm="fp32", proj="int4-g32")
    )
    check_quantized(result)
    lines = shown(result)
    assert lines.count("weight embed.codes") == lines.count("weight embed.scale") == 1
    assert "quant_embedding(tokens.value, embed.codes, embed.scale, None, 'int4-g32')" in lines
    assert lines[-1] == "quant_linear(x, embed.codes, embed.scale, None, 'int4-g32')"


@pytest.mark.parametrize("format", ["int4-g32", "fp16"])
def test_the_given_program_is_left_as_it_was(format):
    program = build(tied=True)
    before = (shown(program), dict(program.inputs), str(program.graph))
    result = quantize_program(program, plan(embed=format, norm="fp32", proj=format))
    assert (shown(program), dict(program.inputs), str(program.graph)) == before
    check_float(program)
    assert result.graph is not program.graph
    assert (shown(result) == shown(program)) == (format == "fp16")
    assert (result.context, result.vocab_size) == (program.context, program.vocab_size)


def test_the_rewritten_program_computes_with_the_stored_values():
    generator = torch.Generator().manual_seed(0)
    weights = {
        "embed": torch.randn(VOCAB, WIDTH, generator=generator),
        "norm": torch.ones(WIDTH),
        "proj": torch.randn(WIDTH, WIDTH, generator=generator),
    }
    program = build(tied=True)
    formats = plan(embed="int8-pc", norm="fp32", proj="int4-g32-asym")
    result = quantize_program(program, formats)
    made = {
        name: RTN.quantize_rows(weights[name], formats.weights[name].format)
        for name in ("embed", "proj")
    }
    tokens = torch.tensor([[3, 0, 19]])

    def run(program: Program, read) -> torch.Tensor:
        values = [
            tokens if program.inputs[n.name].kind == "tokens" else read(program.inputs[n.name])
            for n in program.graph.nodes
            if n.op == "placeholder"
        ]
        return fx.Interpreter(fx.GraphModule({}, program.graph)).run(*values)[0]

    def stored(given: Input) -> torch.Tensor:
        return (
            weights[given.name] if given.part == "value" else getattr(made[given.name], given.part)
        )

    def rounded(given: Input) -> torch.Tensor:
        if given.name == "norm":
            return weights["norm"]
        rows, format = made[given.name], formats.weights[given.name].format
        codes = rows.codes
        if format.bits == 4:
            codes = torch.stack((codes % 16, codes // 16), -1).reshape(WIDTH, 2, -1)
            zero = torch.stack((rows.zero_point % 16, rows.zero_point // 16), -1).reshape(-1, 2, 1)
            return ((codes.float() - zero) * rows.scale.float()[..., None]).reshape(WIDTH, WIDTH)
        return (codes.float() - 128) * rows.scale.float()

    found, expected = run(result, stored), run(program, rounded)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, run(program, lambda given: weights[given.name]), atol=1e-2)
