"""``edgeforge coreml-run``: what a package is, its calls in turn, differences, refusals."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgeforge.cli import app as cli
from exporters.coreml.function import FunctionBuilder, Value
from tests.oracles.small_package import BIAS, of_function, quantized_linear, quantized_weight

X = np.arange(16, dtype=np.float16).reshape(2, 8) / 8


@pytest.fixture
def run(edgeforge):
    return lambda *arguments: edgeforge("coreml-run", *arguments)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return quantized_linear(tmp_path_factory.mktemp("run") / "small.mlpackage")


@pytest.fixture
def inputs(tmp_path) -> Path:
    np.savez(tmp_path / "x.npz", x=X)
    return tmp_path / "x.npz"


def counter(f: FunctionBuilder) -> Value:
    x, state = f.input("x", "fp16", (1,)), f.state("sum", (1,))
    old = f.call("read_state", "old", "fp16", (1,), input=state)
    new = f.call("add", "total", "fp16", (1,), x=old, y=x)
    f.call_many("write_state", [], input=state, data=new)
    return new


def test_a_package_is_described(run, package):
    done = run(package)
    assert done.code == 0
    assert "function main (default)" in done.out
    assert "weights: 1 int4 by constexpr_blockwise_shift_scale, 1 fp16" in done.out
    told = json.loads(run(package, "--json").out)["functions"]["main"]
    assert told["operations"]["linear"] == 1 and told["unknown_operations"] == []


def test_outputs_are_written_and_compared(run, package, inputs, tmp_path):
    result = tmp_path / "y.npz"
    assert run(package, "--inputs", inputs, "--outputs", result, "--precision", "fp32").code == 0
    wanted = X.astype(np.float32) @ quantized_weight().T + BIAS
    np.testing.assert_allclose(np.load(result)["y"], wanted, rtol=1e-6)
    done = run(package, "--inputs", inputs, "--compare", result, "--tolerance", "1e-3")
    assert done.code == 0 and "of range" in done.out
    np.savez(result, y=wanted + 10)
    done = run(package, "--inputs", inputs, "--compare", result, "--tolerance", "1e-3")
    assert done.code == 1
    assert done.err.startswith("edgeforge: the output 'y' differs by ")
    told = json.loads(run(package, "--inputs", inputs, "--compare", result, "--json").out)
    assert told["differences"][0]["largest"] == pytest.approx(10, abs=0.1)
    assert told["differences"][0]["same_argmax"] == 1


def test_outputs_that_are_not_finite_are_counted(run, package, tmp_path):
    far = X.astype(np.float32)
    far[0] *= 1e5
    np.savez(tmp_path / "far.npz", x=far)
    call = (package, "--inputs", tmp_path / "far.npz")
    assert json.loads(run(*call, "--json").out)["outputs"]["y"]["not_finite"] == 6
    assert ", 6 values NaN or infinite" in run(*call).out
    told = json.loads(run(*call, "--json", "--precision", "fp32").out)
    assert told["outputs"]["y"]["not_finite"] == 0


def test_what_is_not_a_number_is_no_agreement(run, package, inputs, tmp_path):
    np.savez(tmp_path / "nan.npz", y=np.full((2, 6), np.nan))
    done = run(package, "--inputs", inputs, "--compare", tmp_path / "nan.npz", "--tolerance", 1)
    assert done.code == 1


def test_calls_in_turn_keep_their_states(run, tmp_path):
    package = of_function(tmp_path / "counter.mlpackage", counter)
    calls = []
    for value in (1, 2, 4):
        np.savez(tmp_path / f"{value}.npz", x=np.array([value]))
        calls += ["--inputs", tmp_path / f"{value}.npz"]
    assert run(package, *calls, "--outputs", tmp_path / "last.npz").code == 0
    assert np.load(tmp_path / "last.npz")["total"] == [7]
    each = [part for n in range(3) for part in ("--outputs", tmp_path / f"out{n}.npz")]
    assert run(package, *calls, *each).code == 0
    assert [float(np.load(tmp_path / f"out{n}.npz")["total"][0]) for n in range(3)] == [1, 3, 7]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--inputs", "none.npz"], 2, "there is no file none.npz"),
        (["--outputs", "y.npz"], 2, "there are no outputs without inputs"),
        (["--inputs", "X", "--function", "decode"], 5, "has no function 'decode'; it has main"),
        (["--inputs", "X", "--precision", "fp8"], 2, "there is no precision fp8"),
        (["--inputs", "X", "--outputs", "a", "--outputs", "b"], 2, "1 calls and 2 output files"),
        (["--inputs", "X", "--compare", "X"], 2, "has none of the outputs y; it has x"),
        (["--inputs", "TEXT"], 2, "is not an .npz file of numbers"),
        (["--inputs", "X", "--outputs", "none/y.npz"], 2, "there is no folder none"),
    ],
)
def test_what_is_refused(run, package, inputs, tmp_path, arguments, code, words):
    (tmp_path / "text").write_text("no numbers")
    places = {"X": inputs, "TEXT": tmp_path / "text"}
    done = run(package, *(places.get(each, each) for each in arguments))
    assert done.code == code
    assert words in done.err and done.err.count("\n") == 1


def test_outputs_replace_nothing_that_is_read(run, package, inputs, tmp_path):
    other, before = tmp_path / "y.npz", inputs.read_bytes()
    np.savez(other, y=X)
    (tmp_path / "link.npz").symlink_to("x.npz")
    both = ("--inputs", inputs, "--inputs", inputs)
    for arguments, words in (
        (("--inputs", inputs, "--outputs", inputs), "is the inputs"),
        (("--inputs", inputs, "--outputs", tmp_path / "link.npz"), "is the inputs"),
        (("--inputs", inputs, "--outputs", other, "--compare", other), "is the file to compare"),
        (("--inputs", inputs, "--outputs", package / "y.npz"), "lies in the package"),
        ((*both, "--outputs", other, "--outputs", other), "is another call's --outputs"),
    ):
        done = run(package, *arguments)
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1
    assert inputs.read_bytes() == before and not (package / "y.npz").exists()
    assert run(package, "--inputs", inputs, "--outputs", tmp_path).code == 2


def test_a_package_that_is_none(run, tmp_path):
    done = run(tmp_path)
    assert done.code == 5 and "is no Core ML package" in done.err


def test_operations_are_listed(edgeforge):
    told = json.loads(edgeforge("list", "coreml-operations", "--json").out)
    assert told["scaled_dot_product_attention"] == "matrix products and attention"


def test_the_documentation_lists_what_the_interpreter_runs():
    from edgeforge.cli.catalogue import catalogue

    text = (Path(cli.__file__).parents[2] / "docs" / "coreml-interpreter.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    groups: dict[str, list[str]] = {}
    for name, group in catalogue("coreml-operations").items():
        groups.setdefault(group, []).append(f"`{name}`")
    for group, names in groups.items():
        assert rows[group] == f"| {group} | {', '.join(names)} |"


def npy(shape: str, data: bytes = b"") -> bytes:
    """An array's file with a header that says this shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("(1099511627776,)"), "claims float32(1099511627776,) in "),
        (npy("(-1,)"), "is not an .npz file of numbers"),
        (npy("(200,)", bytes(4)), "claims float32(200,) in "),
        (npy("(" + "9" * 4000 + ",)").replace(b"\n", b""), "is not an .npz file of numbers"),
        (b"no array", "is not an .npz file of numbers"),
    ],
)
def test_arrays_that_claim_more_than_they_hold(run, package, tmp_path, content, words):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    done = run(package, "--inputs", tmp_path / "x.npz")
    assert done.code == 2 and done.err.count("\n") == 1 and len(done.err) < 600
    assert "is not an .npz file of numbers" in done.err and words in done.err


def test_an_archive_that_unpacks_to_gigabytes_is_refused(run, package, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeforge.arrays_file.MOST_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 20, np.float32))
    done = run(package, "--inputs", tmp_path / "x.npz")
    assert done.code == 2 and "claims arrays of 4194432 bytes in all; at most" in done.err


def test_results_that_are_no_numbers_are_null_in_json(run, package, inputs, tmp_path):
    """JSON has no NaN: a parser that keeps to the standard must read what is printed."""

    def strict(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    np.savez(tmp_path / "nan.npz", x=np.full((2, 8), np.nan, np.float16))
    done = run(package, "--inputs", tmp_path / "nan.npz", "--json")
    told = json.loads(done.out, parse_constant=strict)["outputs"]["y"]
    assert (told["least"], told["largest"]) == (None, None)
    np.savez(tmp_path / "y.npz", y=np.full((2, 6), np.inf))
    done = run(package, "--inputs", inputs, "--compare", tmp_path / "y.npz", "--json")
    assert json.loads(done.out, parse_constant=strict)["differences"][0]["largest"] is None
