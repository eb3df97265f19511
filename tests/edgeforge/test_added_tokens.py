"""What a tokenizer puts around a text: as transformers and the runtimes' own tokenizers do."""

import json
import random

import numpy as np
import pytest

from edgeforge import api
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import TINY_BOS, TINY_EOS, synthesise
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest
from exporters.registry import TARGETS, find_target

TEXT = "The 2 cats,\n  größe."
BEGIN = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
END = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
ALL = {"Sequence": {"id": "A", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def template(*pieces):
    known = {"<|begin|>": TINY_BOS, "<|end|>": TINY_EOS}
    used = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [known[name]], "tokens": [name]} for name in used
        },
    }


# What the post-processor puts in front of a text and behind it.
POST_PROCESSORS = {
    "none": (None, ((), ())),
    "byte-level": ({**BYTE_LEVEL, "use_regex": False}, ((), ())),
    "nothing": (template(ALL), ((), ())),
    "bos": (template(BEGIN, ALL), ((TINY_BOS,), ())),
    "two": (template(BEGIN, END, ALL), ((TINY_BOS, TINY_EOS), ())),
    "bos and eos": (template(BEGIN, ALL, END), ((TINY_BOS,), (TINY_EOS,))),
    "sequence": (
        {
            "type": "Sequence",
            "processors": [{**BYTE_LEVEL, "use_regex": False}, template(BEGIN, ALL)],
        },
        ((TINY_BOS,), ()),
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return synthesise("tiny-llama", tmp_path_factory.mktemp("added") / "checkpoint")


def put(folder, post_processor, **config):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = post_processor
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    known = {key: value for key, value in known.items() if not key.startswith("add_")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **config}))


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_a_prompts_tokens_are_those_of_transformers(checkpoint, name, flag):
    from transformers import AutoTokenizer

    post_processor, added = POST_PROCESSORS[name]
    flags = {} if flag is None else {"add_bos_token": flag, "add_eos_token": flag}
    put(checkpoint, post_processor, **flags)
    tokenizer = Tokenizer(checkpoint / "tokenizer.json", "here")
    wanted = AutoTokenizer.from_pretrained(str(checkpoint))(TEXT).input_ids
    assert tokenizer.encode_prompt(TEXT) == (wanted, False)
    assert tokenizer.added() == added


@pytest.mark.parametrize("name", ["none", "bos", "bos and eos"])
def test_executorchs_tokenizer_gives_the_same_with_the_manifests_num_bos(
    checkpoint, tmp_path, monkeypatch, name
):
    from pytorch_tokenizers import CppHFTokenizer

    post_processor, (prefix, suffix) = POST_PROCESSORS[name]
    put(checkpoint, post_processor)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    options = ExportOptions("int8", context=32)
    targets = [find_target(target) for target in TARGETS]
    export(open_model(str(checkpoint)), targets, tmp_path / "out", options)
    for target in TARGETS:
        record = Manifest.read(tmp_path / "out" / target).tokenizer
        assert record is not None and (record.prefix, record.suffix) == (prefix, suffix)
    theirs = CppHFTokenizer()
    theirs.load(str(tmp_path / "out" / "executorch" / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "out" / "executorch" / "tokenizer.json", "here")
    assert theirs.encode("The 2 cats.", record.num_bos, 0) == ours.encode("The 2 cats.")


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", ["none", "bos", "bos and eos"])
def test_genais_tokenizer_gives_the_same_whatever_the_config_says(
    checkpoint, tmp_path, monkeypatch, name, flag
):
    import onnxruntime_genai

    put(checkpoint, POST_PROCESSORS[name][0], add_bos_token=flag, add_eos_token=flag)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    (folder,) = api.export(checkpoint, tmp_path / "out", recipe="int8", context=32)
    theirs = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    theirs.update_options(add_special_tokens="true")
    ours = Tokenizer(folder / "tokenizer.json", "here")
    assert list(theirs.encode("The 2 cats.")) == ours.encode("The 2 cats.")
    told = [each for each in Manifest.read(folder).warnings if "add_bos_token" in each]
    assert len(told) == (flag != bool(POST_PROCESSORS[name][1][0]))
    assert all("is followed, as in transformers" in each for each in told)


def test_the_same_tokens_reach_every_runtime(edgeforge, checkpoint, tmp_path, monkeypatch):
    """`run` feeds a prompt as the tokenizer gives it; the session is asked for the first token."""
    put(checkpoint, None)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    api.export(checkpoint, tmp_path / "out", targets=list(TARGETS), recipe="int8", context=32)
    for target in TARGETS:
        folder = tmp_path / "out" / target
        assert Manifest.read(folder).model.bos == TINY_BOS
        shown = edgeforge("run", folder, "-p", "cats", "-n", "1", "--json")
        assert json.loads(shown.out)["prompt_tokens"] == 4
        with api.load(folder, threads=1) as session:
            logits = session.extend(np.array(list(b"cats"), np.int64))
        assert json.loads(shown.out)["tokens"] in ([int(logits.argmax())], [])


def test_blocks_of_calibration_and_evaluation_begin_as_the_tokenizer_begins_texts(
    checkpoint, tmp_path
):
    from edgeforge.calibration.text import CalibrationOptions, draw_calibration
    from edgeforge.verification.sample import choose_sample

    text = tmp_path / "text.txt"
    draw = random.Random(0)
    text.write_text(" ".join(str(draw.randrange(10**6)) for _ in range(300)))
    for name in ("none", "bos", "two"):
        post_processor, (prefix, _) = POST_PROCESSORS[name]
        put(checkpoint, post_processor)
        model = open_model(str(checkpoint))
        options = CalibrationOptions(str(text), tokens=64, length=16)
        drawn = draw_calibration(model, options, 32)
        sample = choose_sample(checkpoint, model.spec, 32, text, 64, None)
        for block in (*drawn.blocks, *sample.blocks):
            assert tuple(block[: len(prefix)]) == prefix
            assert not {TINY_BOS, TINY_EOS} & set(block[len(prefix) :])


def test_the_demo_models_blocks_are_as_they_were():
    from edgeforge.model.model import DEMO_FOLDER

    tokenizer = Tokenizer(DEMO_FOLDER / "tokenizer.json", "demo")
    assert tokenizer.added() == ((1,), ())
    assert open_model("demo").spec.bos == 1
