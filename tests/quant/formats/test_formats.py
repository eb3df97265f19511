"""Names, sizes and refusals of the weight formats."""

import pytest

from quant.errors import QuantizationError
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, TensorLayout, parse_format

NAMES = [
    *("int4-g32", "int4-g64", "int4-g128", "int4-pc", "int4-g32-asym", "int4-pc-asym"),
    *("int8-g32", "int8-pc", "int8-g64-asym", "int8-pc-asym", "fp32", "fp16", "bf16"),
    *("int2-g16", "int2-g64-asym", "int2-pc", "int3-g32", "int3-pc-asym", "int5-g64"),
    *("int6-g32-asym", "int7-g128"),
    *("lut2-pt", "lut3-gc1", "lut4-gc1", "lut6-pt", "lut8-pt"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reads_back(name):
    assert parse_format(name).name == name


def test_names_mean_what_they_say():
    assert parse_format("int4-g32") == IntFormat(4, 32)
    assert parse_format("int8-pc-asym") == IntFormat(8, None, symmetric=False)
    assert parse_format("bf16") == FloatFormat("bfloat16")
    assert parse_format("lut4-gc16") == PaletteFormat(4, 16)
    assert parse_format("lut6-pt") == PaletteFormat(6, None)


@pytest.mark.parametrize(
    "name",
    [
        *("", "int4", "int1-g32", "int9-g32", "int4-g0", "int4-g33", "int4-g-32"),
        *("INT4-g32", "int4-g32 ", "int3-g20", "int2-g6"),
        *("lut4", "lut5-pt", "lut7-gc16", "lut4-gc0", "lut4-pc", "lut4-g16", "lut4-pt-asym"),
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(QuantizationError):
        parse_format(name)


def test_a_typing_slip_gets_a_suggestion_and_the_list():
    with pytest.raises(QuantizationError, match=r"allowed are .*did you mean int4-g128\?"):
        parse_format("int4-128")


@pytest.mark.parametrize(
    ("name", "layout", "bits"),
    [
        ("int4-g32", {"codes": (6, 48), "scale": (6, 3)}, 4.5),
        ("int4-g32-asym", {"codes": (6, 48), "scale": (6, 3), "zero_point": (6, 2)}, 4 + 32 / 96),
        ("int4-pc", {"codes": (6, 48), "scale": (6, 1)}, 4 + 16 / 96),
        ("int8-pc-asym", {"codes": (6, 96), "scale": (6, 1), "zero_point": (6, 1)}, 8.25),
        ("int2-g32", {"codes": (6, 24), "scale": (6, 3)}, 2.5),
        ("int3-g32", {"codes": (6, 36), "scale": (6, 3)}, 3.5),
        ("int2-g16-asym", {"codes": (6, 24), "scale": (6, 6), "zero_point": (6, 2)}, 3 + 16 / 96),
        ("int3-g32-asym", {"codes": (6, 36), "scale": (6, 3), "zero_point": (6, 2)}, 3.5 + 16 / 96),
        ("int6-pc", {"codes": (6, 72), "scale": (6, 1)}, 6 + 16 / 96),
    ],
)
def test_layout_and_size(name, layout, bits):
    fmt = parse_format(name)
    expected = {
        part: TensorLayout("bfloat16" if part == "scale" else "uint8", shape)
        for part, shape in layout.items()
    }
    assert fmt.layout(6, 96) == expected
    if name == "int4-g32-asym":
        bits += 16 / 96 + 16 / 96 - 32 / 96 + 16 / 96 + 16 / 96  # three scales, two bytes of points
    assert fmt.bits_per_weight(6, 96) == pytest.approx(bits)
    assert fmt.nbytes(6, 96) == round(bits * 6 * 96 / 8)


def test_float_formats_hold_one_part():
    assert FloatFormat("float16").layout(3, 5) == {"value": TensorLayout("float16", (3, 5))}
    assert FloatFormat("float32").nbytes(3, 5) == 60
    assert FloatFormat("bfloat16").bits_per_weight(3, 5) == 16.0


def test_a_group_that_does_not_divide_is_refused_with_advice():
    with pytest.raises(QuantizationError) as error:
        IntFormat(4, 32).check("model.layers.0.mlp.down_proj.weight", 8, 100)
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj.weight has 100 input columns; int4-g32 needs a multiple of "
        "group_size 32: use group_size 20 or keep it int8-pc"
    )


@pytest.mark.parametrize(
    ("name", "cols", "advice"),
    [
        ("int4-pc", 33, "even number.*int8-pc"),
        ("int4-g64", 96, "use group_size 48 or"),
        ("int8-g32", 37, "group_size 32: keep it int8-pc"),
        ("int2-pc", 34, "a multiple of 4, because a row's codes fill whole bytes: keep it int8-pc"),
        ("int3-g32", 100, "a multiple of 8.*int8-pc"),
        ("int3-g64", 96, "use group_size 48 or"),
        ("int8-pc", 0, "at least one"),
        ("fp16", 0, "at least one"),
    ],
)
def test_shapes_that_do_not_fit(name, cols, advice):
    with pytest.raises(QuantizationError, match=advice):
        parse_format(name).check("w", 4, cols)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_fit(name):
    parse_format(name).check("w", 1, 256)


@pytest.mark.parametrize("arguments", [(1, 32), (9, 32), (4, 0), (4, 7), (4, -32), (2, 6), (3, 20)])
def test_impossible_formats_are_refused(arguments):
    with pytest.raises(QuantizationError):
        IntFormat(*arguments)


@pytest.mark.parametrize(
    ("name", "codes", "lut"),
    [
        ("lut4-gc16", (48, 48), (3, 16)),
        ("lut3-gc8", (48, 36), (6, 8)),
        ("lut6-pt", (48, 72), (1, 64)),
        ("lut2-gc48", (48, 24), (1, 4)),
        ("lut8-gc1", (48, 96), (48, 256)),
    ],
)
def test_palettes_hold_codes_and_tables(name, codes, lut):
    fmt = parse_format(name)
    parts = {"codes": TensorLayout("uint8", codes), "lut": TensorLayout("float16", lut)}
    assert fmt.layout(48, 96) == parts
    assert fmt.nbytes(48, 96) == codes[0] * codes[1] + 2 * lut[0] * lut[1]
    assert fmt.bits_per_weight(48, 96) == 8 * fmt.nbytes(48, 96) / (48 * 96)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "lut4-gc16",
            (40, 64),
            r"w has 40 output rows; lut4-gc16 needs a multiple of 16, .* use lut4-gc10, or one "
            r"table for all rows with lut4-pt",
        ),
        ("lut4-pt", (4, 7), "7 input columns; lut4-pt needs a multiple of 2, .* use lut8-pt, or"),
        ("lut3-gc4", (4, 12), "needs a multiple of 8, .* lut2-gc4 or lut4-gc4 or lut6-gc4 or lut8"),
        ("lut6-pt", (4, 6), "needs a multiple of 4, .* use lut4-pt or lut8-pt, or keep it fp16"),
        ("lut8-gc2", (0, 8), "at least one row"),
    ],
)
def test_palettes_refuse_shapes_with_advice(name, shape, words):
    with pytest.raises(QuantizationError, match=words):
        parse_format(name).check("w", *shape)


@pytest.mark.parametrize("arguments", [(5, 16), (1, None), (4, 0), (4, -16)])
def test_impossible_palettes_are_refused(arguments):
    with pytest.raises(QuantizationError):
        PaletteFormat(*arguments)


def test_a_slip_in_a_palettes_name_gets_a_suggestion():
    with pytest.raises(QuantizationError, match=r"lut4-gc16; and .*did you mean lut4-gc16\?"):
        parse_format("lut4-g16")


def test_unknown_float_dtype_is_refused():
    with pytest.raises(QuantizationError, match="float8"):
        FloatFormat("float8")
