"""The examples do what they say, and the snippets for phones name what artifacts have."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import edgeforge
from edgeforge.synth.synthesise import write_byte_tokenizer
from exporters.coreml.package import Package, open_package
from exporters.manifest import Manifest
from tests.oracles import hugging_face
from tests.oracles.tiny_families import CONFIGS, VOCAB

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PROMPTS = [
    "The function returns a list of",
    'class Error(Exception):\n    """Raised when',
    " ".join(["Install the package with apt and then"] * 30),  # more than one ExecuTorch run takes
    "  naïve café, 3.14\n\n\t* one",
]
SCRIPTS = {
    "export_and_verify.py": "edgeforge",
    "onnxruntime_plain.py": "onnxruntime",
    "onnxruntime_genai_stream.py": "onnxruntime_genai",
    "executorch_runner.py": "executorch",
}
COUNT = 40


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> Path:
    """A folder of EdgeForge's packages that cannot be imported."""
    folder = tmp_path_factory.mktemp("refusing")
    for name in ("edgeforge", "device_harness", "exporters", "quant"):
        (folder / f"{name}.py").write_text("raise ImportError('this example needs no EdgeForge')\n")
    return folder


def call(script: str, *words: object, first: Path | None = None) -> subprocess.CompletedProcess:
    """Runs an example; modules in ``first`` come before all others."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(path) for path in [first, *inherited] if path]
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=300,
    )


def printed(script: str, *words: object, first: Path | None = None) -> str:
    done = call(script, *words, first=first)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, str]:
    """The first example's folder and what it printed; the other examples take its artifacts."""
    out = tmp_path_factory.mktemp("exported") / "demo"
    return out, printed("export_and_verify.py", out, "--tokens", 256)


@pytest.fixture(scope="module")
def demo(exported) -> Path:
    return exported[0]


@functools.cache
def greedy(folder: Path, prompt: str, stop: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """What `edgeforge.load` gives: the likeliest token, again and again."""
    session = edgeforge.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    logits = session.extend(np.array(tokenizer.encode(prompt).ids, np.int64))
    tokens: list[int] = []
    while len(tokens) < COUNT and (token := int(logits.argmax())) not in stop:
        tokens.append(token)
        logits = session.extend(np.array([token], np.int64))
    return tuple(tokens)


def text_of(folder: Path, tokens: tuple[int, ...]) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(tokens))


def ids_in(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def test_export_and_verify_prints_what_verify_found(exported):
    folder, output = exported
    sections = re.split(r"^(?=\S)", output, flags=re.MULTILINE)[1:]
    for target, section in zip(("onnx", "executorch"), sections, strict=True):
        assert section.startswith(f"{folder / target}: ")
        report = json.loads((folder / target / "report.json").read_text(encoding="utf-8"))
        assert report["runtime"] in section
        assert f"perplexity: {report['perplexity_ratio']:.4f} times" in section
        assert f"by quantization: {report['quantization']['kl_mean']:.1e} nats" in section
        assert f"by lowering: {report['lowering']['kl_mean']:.1e} nats" in section
        assert 0 <= report["lowering"]["kl_mean"] < report["quantization"]["kl_mean"]
        # What it says comes next is what greedy decoding takes.
        likeliest = text_of(folder / target, greedy(folder / target, "The function returns")[:1])
        assert f"goes on with {likeliest!r} " in section


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("script", ["onnxruntime_plain.py", "onnxruntime_genai_stream.py"])
def test_onnx_scripts_give_the_tokens_that_edgeforge_gives(script, prompt, demo, refusing):
    folder = demo / "onnx"
    wanted = greedy(folder, prompt)
    assert len(wanted) == COUNT
    words = [folder, "--prompt", prompt, "--max-tokens", COUNT]
    assert ids_in(printed(script, *words, "--ids", first=refusing)) == wanted
    assert printed(script, *words, first=refusing) == text_of(folder, wanted) + "\n"


@pytest.mark.parametrize("prompt", PROMPTS[1:3])
def test_executorchs_runner_gives_the_text_that_edgeforge_gives(prompt, demo, refusing):
    folder = demo / "executorch"
    wanted = greedy(folder, prompt)
    assert len(wanted) == COUNT
    words = [folder, "--prompt", prompt, "--max-tokens", COUNT]
    text = printed("executorch_runner.py", *words, first=refusing)
    assert text == text_of(folder, wanted) + "\n"


@pytest.mark.parametrize("script", ["onnxruntime_plain.py", "onnxruntime_genai_stream.py"])
def test_onnx_scripts_stop_at_an_end_token(script, demo, tmp_path):
    """The artifact is told that a token of the continuation ends a text."""
    folder = tmp_path / "artifact"
    shutil.copytree(demo / "onnx", folder)
    whole = greedy(folder, PROMPTS[0])
    end = whole[6]
    manifest = json.loads((folder / "edgeforge.json").read_text(encoding="utf-8"))
    manifest["model"]["eos"] = [2, end]
    (folder / "edgeforge.json").write_text(json.dumps(manifest), encoding="utf-8")
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = [2, end]
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted = greedy(folder, PROMPTS[0], frozenset([end]))
    assert wanted == whole[: whole.index(end)] and 0 < len(wanted) <= 6
    ids = printed(script, folder, "--prompt", PROMPTS[0], "--max-tokens", COUNT, "--ids")
    assert ids_in(ids) == wanted


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """An artifact of a context of 24 tokens."""
    (folder,) = edgeforge.export("demo", tmp_path_factory.mktemp("short") / "demo", context=24)
    return folder


@pytest.mark.parametrize("script", ["onnxruntime_plain.py", "onnxruntime_genai_stream.py"])
def test_onnx_scripts_stop_where_the_context_is_full(script, short):
    folder = short
    prompt = "The function returns"
    length = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids)
    ids = printed(script, folder, "--prompt", prompt, "--max-tokens", 100, "--ids").split()
    # onnxruntime-genai does not give the token that would come after the last position.
    assert len(ids) == 24 - length + (script == "onnxruntime_plain.py")
    done = call(script, folder, "--prompt", PROMPTS[2])
    assert done.returncode == 1
    assert re.fullmatch(r"the prompt has \d+ tokens; the context has room for .*\n", done.stderr)


def test_plain_onnxruntime_runs_int8_caches(tmp_path):
    (folder,) = edgeforge.export(
        "demo", tmp_path / "int8", context=128, kv_cache="int8", calibration_tokens=1024
    )
    states = Manifest.read(folder).states.values()
    assert all(state.startswith("int8") for state in states)
    words = [folder, "--prompt", PROMPTS[0], "--max-tokens", COUNT, "--ids"]
    ids = printed("onnxruntime_plain.py", *words)
    assert ids_in(ids) == greedy(folder, PROMPTS[0])


def test_plain_onnxruntime_runs_layers_that_convolve(tmp_path):
    checkpoint = hugging_face.save(tmp_path / "checkpoint", CONFIGS["lfm2"])
    write_byte_tokenizer(checkpoint, VOCAB)
    (folder,) = edgeforge.export(str(checkpoint), tmp_path / "made", context=128)
    assert "past.0.conv" in Manifest.read(folder).states
    words = [folder, "--prompt", PROMPTS[0], "--max-tokens", COUNT, "--ids"]
    ids = printed("onnxruntime_plain.py", *words)
    assert ids_in(ids) == greedy(folder, PROMPTS[0])


def test_executorchs_runner_finds_external_weights(tmp_path):
    (folder,) = edgeforge.export(
        "demo", tmp_path / "external", targets=("executorch",), weights="external"
    )
    assert (folder / "model.ptd").is_file()
    words = [folder, "--prompt", PROMPTS[0], "--max-tokens", COUNT]
    text = printed("executorch_runner.py", *words)
    assert text == text_of(folder, greedy(folder, PROMPTS[0])) + "\n"


@pytest.mark.parametrize("script", list(SCRIPTS)[1:])
def test_a_folder_of_another_kind_is_refused_in_one_sentence(script, demo, tmp_path):
    others = [tmp_path, demo / ("onnx" if script == "executorch_runner.py" else "executorch")]
    for folder in others:
        done = call(script, folder, "--prompt", "A")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"{folder} is ") and done.stderr.count("\n") == 1


def test_an_export_that_is_refused_is_one_sentence(demo):
    done = call("export_and_verify.py", demo)
    assert done.returncode == 1 and done.stdout == ""
    assert str(demo) in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("script", "package"), SCRIPTS.items())
def test_a_missing_package_is_said_with_how_to_install_it(script, package, demo, tmp_path):
    """The package is hidden behind a module that fails as a missing one would."""
    error = f"ModuleNotFoundError('No module named {package}', name='{package}')"
    (tmp_path / f"{package}.py").write_text(f"raise {error}\n")
    folder = demo / ("executorch" if script == "executorch_runner.py" else "onnx")
    words = [folder] if script == "export_and_verify.py" else [folder, "--prompt", "A"]
    done = call(script, *words, first=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"{package} is not installed: pip install .+\n", done.stderr)


def literals(path: Path) -> set[str]:
    """String literals of Swift or Kotlin code; comments are left out."""
    code = "\n".join(line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines())
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    return set(re.findall(r'"([^"\n]*)"', code))


def named_in_comments(path: Path) -> set[str]:
    """File names between backquotes."""
    return set(re.findall(r"`([\w.]+\.(?:json|mlpackage|pte|ptd|onnx))`", path.read_text()))


@pytest.fixture(scope="module")
def coreml(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("coreml") / "demo"
    (folder,) = edgeforge.export("demo", out, targets=("coreml",), recipe="int4")
    return folder


@pytest.fixture(scope="module")
def package(coreml) -> Package:
    return open_package(coreml / "model.mlpackage")


def test_every_name_of_the_swift_snippet_is_in_the_package(package, coreml):
    path = EXAMPLES / "ios" / "Generate.swift"
    used = literals(path)
    functions = {name for name in package.functions if name in used}
    assert functions == {"prefill", "decode"}
    inputs = {each.name for name in functions for each in package.interface(name).inputs}
    outputs = {each.name for name in functions for each in package.interface(name).outputs}
    # Xcode compiles model.mlpackage to model.mlmodelc; `,` separates numbers in the metadata.
    around = {Path(Manifest.read(coreml).entry).stem, "mlmodelc", "", ","}
    assert inputs | outputs <= used
    assert used <= functions | inputs | outputs | set(package.metadata) | around
    states = {each.name for name in functions for each in package.interface(name).states}
    shown = set(re.findall(r'// "(\w+)", \.\.\.', path.read_text(encoding="utf-8")))
    assert shown and shown <= states
    files = named_in_comments(path)
    assert "model.mlpackage" in files and all((coreml / name).exists() for name in files)


def test_the_package_takes_what_the_swift_snippet_gives(package):
    """Types and shapes that the snippet counts on."""
    prefill, decode = package.interface("prefill"), package.interface("decode")
    chunks = [int(size) for size in package.metadata["edgeforge.prefill_tokens"].split(",")]
    for interface, sizes in ((prefill, chunks), (decode, [1])):
        tokens, position = interface.inputs
        assert (tokens.dtype, position.dtype, position.shape) == ("int32", "int32", (1,))
        assert sorted(shape[1] for shape in tokens.shapes or [tokens.shape]) == sorted(sizes)
        (logits,) = interface.outputs
        assert logits.dtype == "fp16" and logits.shape[:2] == (1, 1)
    assert prefill.states == decode.states  # which it copies from one to the other by name
    for key in ("edgeforge.context_length", "edgeforge.bos_token_id", "edgeforge.eos_token_ids"):
        assert package.metadata[key].replace(",", "").isdecimal()


def test_every_name_of_the_kotlin_snippet_is_in_the_artifact(demo):
    path = EXAMPLES / "android" / "Generate.kt"
    folder = demo / "executorch"
    manifest = json.loads((folder / "edgeforge.json").read_text(encoding="utf-8"))
    files = {name for name in literals(path) if "." in name and " " not in name}
    assert files == {"model.pte", "tokenizer.json", "edgeforge.json"} == named_in_comments(path)
    assert all((folder / name).is_file() for name in files)
    keys = {name for name in literals(path) - files if " " not in name}
    assert keys == {"target", "executorch", "tokenizer", "num_bos", "context"}
    assert manifest["target"] == "executorch" and manifest["tokenizer"]["num_bos"] == 1
    assert isinstance(manifest["context"], int)


@pytest.mark.parametrize("name", ["ios/Generate.swift", "android/Generate.kt"])
def test_phone_snippets_say_first_that_they_are_not_compiled(name):
    assert (EXAMPLES / name).read_text(encoding="utf-8").startswith("// NOT COMPILED HERE")


def test_the_readme_names_every_example_and_extras_that_exist():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", readme))
    assert all((EXAMPLES / name).exists() for name in linked)
    snippets = {f"{path.parent.name}/{path.name}" for path in EXAMPLES.glob("*/Generate.*")}
    assert len(snippets) == 2
    assert linked >= {path.name for path in EXAMPLES.glob("*.py")} | snippets
    assert set(SCRIPTS) == {path.name for path in EXAMPLES.glob("*.py")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = [readme, *(path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py"))]
    extras = {name for text in told for name in re.findall(r"edgeforge\[(\w+)\]", text)}
    assert extras and extras <= set(project["optional-dependencies"])


def test_the_python_of_an_onnx_card_gives_the_tokens_that_edgeforge_gives(demo, refusing):
    folder = demo / "onnx"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "CARD.md").read_text(), re.DOTALL)
    prompt = "The function returns"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(refusing)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    wanted = text_of(folder, greedy(folder, prompt))
    assert len(wanted) > 40 and done.stdout.startswith(wanted)
