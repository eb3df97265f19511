"""Programs for other delegates: written whole, labelled, read back, and not run here."""

from __future__ import annotations

import shutil

import pytest

import edgeforge.pipeline as pipeline
from device_harness.errors import DeviceError
from device_harness.registry import open_session
from exporters.errors import ExportError
from exporters.executorch import backends, installed
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.formats.formats import parse_format
from quant.plans.algorithms import IMPORTED, POSITIVE
from quant.plans.plan import Assignment, QuantPlan

ONE_LAYER = {"num_hidden_layers": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module", params=["vulkan", "coreml"])
def artifact(request, pte, llama_config):
    return request.param, pte(llama_config(**ONE_LAYER), "int4-g32", 48, backend=request.param)


def test_the_whole_model_is_one_delegate(artifact):
    backend, made = artifact
    names = {"vulkan": "VulkanBackend", "coreml": "CoreMLBackend"}
    rows = made.manifest.structure["Delegates"]
    methods = ["forward", "logits_all"] if backend == "vulkan" else ["forward"]
    assert [(row["method"], row["backend"], row["delegates"]) for row in rows] == [
        (method, names[backend], 1) for method in methods
    ]
    assert made.manifest.structure["Operators outside delegates"] == []


def test_the_manifest_says_that_it_was_not_run(artifact):
    backend, made = artifact
    assert made.manifest.options == {"backend": backend}
    needs = backends.BACKENDS[backend].needs
    assert f"produced but not executed here: it needs {needs}" in made.manifest.warnings
    assert not any("8 bits" in note for note in made.manifest.notes)


def test_running_it_is_one_sentence(artifact):
    backend, made = artifact
    title, needs = backends.BACKENDS[backend].title, backends.BACKENDS[backend].needs
    with pytest.raises(DeviceError) as caught:
        open_session(made.folder, made.manifest)
    assert str(caught.value) == (
        f"{made.folder} is for ExecuTorch's {title} delegate, which the runtime on this host does "
        f"not have: run it in {needs}"
    )


def test_integers_and_scales_lie_in_the_file(artifact, tmp_path):
    _, made = artifact
    target, wanted = find_target("executorch"), made.store.digests
    assert dict(target.stored_digests(made.folder)) == wanted
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy)
    data = bytearray((copy / "model.pte").read_bytes())
    codes = made.store.part("model.layers.0.mlp.down_proj.weight", "codes").numpy().tobytes()
    signed = bytes(byte ^ 0x88 for byte in codes)
    at = max(data.find(codes), data.find(signed))  # as Vulkan has them, or Core ML
    assert at > 0
    data[at + 5] ^= 1
    (copy / "model.pte").write_bytes(data)
    found = target.stored_digests(copy)
    changed = {name for name in wanted if found[name] != wanted[name]}
    assert changed == {"model.layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("backend", "format", "words"),
    [
        (
            "vulkan",
            "int8-pc",
            "model.embed_tokens.weight is to be int8-pc; ExecuTorch's Vulkan delegate computes "
            "with symmetric 4-bit integers only: use int4-g32, keep it fp16, or use --backend "
            "xnnpack",
        ),
        (
            "vulkan",
            "int4-pc",
            "model.embed_tokens.weight is to be int4-pc; ExecuTorch's Vulkan delegate needs groups "
            "of a multiple of 32: use int4-g32, keep it fp16, or use --backend xnnpack",
        ),
        (
            "coreml",
            "int4-g32-asym",
            "model.embed_tokens.weight is to be int4-g32-asym; ExecuTorch's Core ML delegate is "
            "written for symmetric integers: use int4-g32 or keep it int8-pc",
        ),
    ],
)
def test_what_they_cannot_hold(refusal, backend, format, words):
    also = ", and the same for lm_head.weight and 10 more"
    assert refusal(format, backend=backend) == words + also


@pytest.fixture
def refusal(cache, tmp_path, monkeypatch, checkpoint_of, llama_config):
    """The sentence of a refusal, which comes before any work."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    def refusal(format: str, **options: str) -> str:
        model = checkpoint_of(llama_config())
        monkeypatch.setattr(type(model.checkpoint), "digest", work)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"- {{match: '*', format: {format}}}\n")
        asked = pipeline.ExportOptions(str(recipe), target=TargetOptions(**options))
        with pytest.raises(ExportError) as caught:
            pipeline.export(model, [find_target("executorch")], tmp_path / "out", asked)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return refusal


def test_options_that_are_at_odds(refusal):
    assert refusal("int4-g32", backend="vulkan", lowering="edgeforge") == (
        "--backend vulkan uses ExecuTorch's own exporter: leave out --lowering edgeforge"
    )
    assert refusal("int4-g32", backend="metal") == (
        "--backend metal is not known to executorch: take xnnpack or vulkan or coreml"
    )
    assert refusal("int4-g32", lowering="other") == (
        "--lowering other is not known to executorch: take edgeforge or stock"
    )


def test_executorch_of_another_version(refusal, monkeypatch):
    monkeypatch.setattr(installed, "version", lambda name: "1.5.0")
    assert refusal("int4-g32", backend="vulkan") == (
        "ExecuTorch 1.5.0 is installed; EdgeForge's artifacts are for 1.4.1, and --backend vulkan "
        'lowers with it: pip install "edgeforge[executorch]"'
    )


def test_core_ml_tools_missing(refusal, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert refusal("int4-g32", backend="coreml") == (
        '--backend coreml needs coremltools: pip install "edgeforge[coreml]"'
    )


@pytest.mark.parametrize("backend", list(backends.BACKENDS))
def test_float16_scales_of_imported_checkpoints(backend):
    plan = QuantPlan("as-is", {"w": Assignment(parse_format("int4-g32-f16"), IMPORTED)})
    with pytest.raises(ExportError) as caught:
        backends.check_backend(plan, TargetOptions(backend=backend))
    takes = {
        "xnnpack": "XNNPACK holds",
        "vulkan": "ExecuTorch's Vulkan delegate is given",
        "coreml": "ExecuTorch's Core ML delegate is given",
    }
    assert str(caught.value) == (
        f"w is int4-g32-f16; {takes[backend]} scales as bfloat16: round them with "
        f"--imported-scales bfloat16, which keeps the integers and changes no scale by more than "
        f"0.2 %"
    )


@pytest.mark.parametrize("algorithm", POSITIVE)
@pytest.mark.parametrize("backend", list(backends.BACKENDS))
def test_scales_below_zero(backend, algorithm):
    plan = QuantPlan("mine", {"w": Assignment(parse_format("int4-g32"), algorithm)})
    with pytest.raises(ExportError) as caught:
        backends.check_backend(plan, TargetOptions(backend=backend))
    assert str(caught.value) == (
        f"w is to be filled by {algorithm}, whose scales may be below zero; programs for "
        f"{backends.BACKENDS[backend].title} hold no such scales: use {POSITIVE[algorithm]}"
    )
