"""Ways to spoil a file: its bytes, its numbers, its JSON, its YAML, or what kind of file it is.

Every mutation draws from the generator that it is given, so that a seed gives the same files again.
"""

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, -1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63)
NESTED = "[" * 100_000
VALUES = (
    *(None, True, False, "", [], {}, [[]], 0, 1, -1, 0.5, -0.0, 1e308, 2**31, 2**63, -(2**63)),
    *(2**64, 10**40, "../../../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 100_000),
    *([0] * 10_000, {"a": {"b": {"c": []}}}, "9" * 5_000, ".", "..", "C:\\x", "int4-g32", "1e9"),
)
# What stands in the text in place of a value, since `json.dumps` would not write it.
TEXTS = ("NaN", "-Infinity", "1e999", "9" * 5_000, NESTED, '"\\ud800"', "{", "'x'", "0x10", "")
BOMB = "- match: '*'\n  format:\n" + "\n".join(
    ["  - &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)
YAML = (
    *("*", "*a", "&a x", "[", "{", "!!python/object/apply:os.system [true]", "!!binary x", "~"),
    *("2026-13-45", "2026-11-28", "9" * 5_000, "0x" + "f" * 5_000, ".nan", "1e999", "'", '"', ": "),
    *(
        "[[[]]]",
        "{a: {b: c}}",
        "? [x]",
        "<<: *a",
        "\t",
        "|",
        "x: y: z",
        "%TAG",
        "---",
        "...",
        NESTED,
    ),
)


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    """Flips one bit."""
    spoiled = bytearray(data)
    if spoiled:
        spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def set_number(data: bytes, draw: random.Random) -> bytes:
    """Writes a number of 1 to 8 bytes over the bytes at some place."""
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice(NUMBERS) % (1 << 8 * size)
    at = draw.randrange(max(1, len(data) - size))
    return data[:at] + struct.pack("<Q", number)[:size] + data[at + size :]


def cut(data: bytes, draw: random.Random) -> bytes:
    """Cuts the end off."""
    return data[: draw.randrange(max(1, len(data)))]


def leave_out(data: bytes, draw: random.Random) -> bytes:
    """Leaves up to 64 bytes out."""
    at = draw.randrange(max(1, len(data)))
    return data[:at] + data[at + draw.randint(1, 64) :]


def say_twice(data: bytes, draw: random.Random) -> bytes:
    """Says up to 256 bytes twice."""
    at = draw.randrange(max(1, len(data)))
    end = at + draw.randint(1, 256)
    return data[:end] + data[at:end] + data[end:]


def put_in(data: bytes, draw: random.Random) -> bytes:
    """Puts random bytes in."""
    at = draw.randrange(max(1, len(data)))
    return data[:at] + draw.randbytes(draw.randint(1, 64)) + data[at:]


def stranger(data: bytes, draw: random.Random) -> bytes:
    """Replaces the file by one of another kind."""
    return draw.choice(
        (
            b"",
            b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63) + draw.randbytes(100),
            b"<!DOCTYPE html><html><body>404</body></html>\n",
            b"PK\x03\x04" + draw.randbytes(200),
            b"\x80\x02cos\nsystem\n(S'true'\ntR.",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
            b"\xef\xbb\xbf" + data,
            data.decode("latin-1").encode("utf-16"),
            b"\xff" * 100,
            draw.randbytes(1000),
            bytes(4096),
        )
    )


def spoil_header(data: bytes, draw: random.Random) -> bytes:
    """Spoils one of the first 256 bytes, where formats keep lengths and offsets."""
    how = draw.choice((flip_bit, set_number, leave_out, put_in))
    return how(data[:256], draw) + data[256:]


def spoil_metadata(data: bytes, draw: random.Random) -> bytes:
    """Spoils one of the first 2,048 bytes, where GGUF keeps its fields and lists its tensors."""
    how = draw.choice((flip_bit, set_number, leave_out, put_in))
    return how(data[:2048], draw) + data[2048:]


def json_value(data: bytes, draw: random.Random) -> bytes:
    """Replaces, removes, repeats or renames one value of a JSON text."""
    try:
        tree = json.loads(data)
    except ValueError:
        return flip_bit(data, draw)
    places: list[tuple[object, object]] = []
    _walk(tree, places)
    if not places:
        return flip_bit(data, draw)
    owner, key = draw.choice(places)
    how = draw.randrange(6)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, dict):
        owner[draw.choice(("", "x", "__metadata__", "../x", "a" * 1000))] = owner.pop(key)
    elif how == 2:
        owner[key] = [owner[key]]
    elif how == 3:
        owner[key] = "@@hostile@@"
        return json.dumps(tree).replace('"@@hostile@@"', draw.choice(TEXTS)).encode()
    else:
        owner[key] = draw.choice(VALUES)
    return json.dumps(tree).encode()


def _walk(tree: object, places: list[tuple[object, object]]) -> None:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        places.append((tree, key))
        if isinstance(value, dict | list):
            _walk(value, places)


def json_text(data: bytes, draw: random.Random) -> bytes:
    """Repeats a key, nests the text deeply, or adds what no JSON text holds."""
    how = draw.randrange(5)
    if how == 0:
        pairs = re.findall(rb'"[^"{}\[\]]{1,40}": ?(?:"[^"]{0,40}"|\d+)', data)
        pair = draw.choice(pairs or [b'"a": 1'])
        return data.replace(pair, pair + b", " + pair, 1)
    if how == 1:
        return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    if how == 2:
        return data + draw.choice((b"}", b"x", b"\0", b"{}"))
    if how == 3:
        return b"[" + b"0," * 3_000_000 + b"0]"
    return b"\xef\xbb\xbf" + data


def yaml_text(data: bytes, draw: random.Random) -> bytes:
    """Replaces a word of a YAML text by something strange, or repeats a key, or adds aliases."""
    how = draw.randrange(6)
    if how == 0:
        return BOMB.encode()
    if how == 1:
        return data + b"\n" + BOMB.encode()
    if how == 2:
        return data.replace(b"match:", b"match: x, match:", 1)
    if how == 3:
        return data.replace(b"format:", draw.choice((b"formats:", b"? ", b"format: x, y:")), 1)
    words = [m.span() for m in re.finditer(rb"[^\s,{}:'\[\]]+", data)]
    start, end = draw.choice(words or [(0, 0)])
    return data[:start] + draw.choice(YAML).encode() + data[end:]


def external_data(data: bytes, draw: random.Random) -> bytes:
    """Changes where a tensor of an ONNX graph lies, or what it is called or how large it is."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    apart = [tensor for tensor in model.graph.initializer if tensor.external_data]
    tensor = draw.choice(apart)
    how = draw.randrange(4)
    if how == 0:
        tensor.dims.append(draw.choice((0, 2**31, 2**62, 2**63 - 1, -1)))
    elif how == 1:
        tensor.name = draw.choice(apart).name
    elif how == 2:
        del tensor.external_data[draw.randrange(len(tensor.external_data))]
    else:
        entry = draw.choice(tensor.external_data)
        number = str(draw.choice(NUMBERS))
        places = ("/etc/passwd", "../../../etc/passwd", "/dev/zero", "model.onnx", "", "a\n\x1b[2J")
        entry.value = draw.choice((number, number, "9" * 5_000, "\u0663", "-1", *places))
    return bytes(model.SerializeToString())


def mil_program(data: bytes, draw: random.Random) -> bytes:
    """Changes a type, a constant, a name or an argument of a Core ML program."""
    from exporters.coreml.schema import messages

    model = messages()["Model"].FromString(data)
    function = draw.choice(list(model.mlProgram.functions.values()))
    (block,) = function.block_specializations.values()
    operation = draw.choice(block.operations)
    kinds = [output.type for output in operation.outputs]
    kinds += [value.type for value in operation.attributes.values()]
    kind, how = draw.choice(kinds or [messages()["ValueType"]()]), draw.randrange(7)
    if how == 0 and kind.tensorType.dimensions:
        size = draw.choice(NUMBERS) % 2**64
        draw.choice(kind.tensorType.dimensions).constant.size = size
    elif how == 1:
        kind.tensorType.dataType = draw.choice((0, 1, 2, 10, 11, 23, 25, 33, 99))
    elif how == 2:
        value = operation.attributes["val"]
        value.type.tensorType.dimensions.add().constant.size = draw.choice((2**31, 2**62, 3))
        value.immediateValue.tensor.floats.values.append(1)
    elif how == 3:
        operation.type = draw.choice(("const", "while_loop", "tile", "fill", "x", "linear"))
    elif how == 4:
        operation.inputs[draw.choice(("x", "shape", "y", "making"))].arguments.add(name="x")
    elif how == 5:
        for value in operation.attributes.values():
            value.blobFileValue.offset = draw.choice(NUMBERS) % 2**64
            value.blobFileValue.fileName = draw.choice(("@model_path/weights/weight.bin", "../x"))
    else:
        function.inputs.add(name="s", type=kind)
    return bytes(model.SerializeToString())


def special_file(path: Path, draw: random.Random) -> None:
    """Puts something that is no regular file in a file's place."""
    path.unlink()
    how = draw.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    else:
        places = ("/dev/zero", "/proc/self/environ", "/dev/null", "nowhere")
        path.symlink_to(places[how - 2])


BYTES: tuple[Mutation, ...] = (
    *(flip_bit, flip_bit, set_number, set_number, cut, leave_out, say_twice, put_in, stranger),
    *(spoil_header, spoil_header),
)
ONNX: tuple[Mutation, ...] = (*([external_data] * 8), *BYTES)
MIL: tuple[Mutation, ...] = (*([mil_program] * 12), *BYTES)
GGUF: tuple[Mutation, ...] = (*([spoil_metadata] * 12), *BYTES)
JSON: tuple[Mutation, ...] = (*([json_value] * 8), json_text, flip_bit, cut, stranger)
YAML_TEXT: tuple[Mutation, ...] = (*([yaml_text] * 6), flip_bit, cut, stranger)
