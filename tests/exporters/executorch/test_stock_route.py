"""Logits equal, bit for bit, those of the program that ExecuTorch's own exporter makes.

That program, `--lowering stock`, is a product of its own too: it runs, and its integers and scales
read back out of it equal the store's.
"""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import edgeforge.pipeline as pipeline
from device_harness.executorch_worker import load_runtime
from exporters.errors import ExportError
from exporters.executorch import installed, state
from exporters.executorch.reader import read_pte
from exporters.executorch.stock.names import NAMES
from exporters.executorch.tensors import file_tensors
from exporters.registry import find_target

# Every kind of weight that the delegate knows, in one model.
MIXED = """
- {match: embedding, format: %s}
- {match: '*layers.0*qk_proj*', format: int4-g32}
- {match: '*layers.0*o_proj*', format: int4-pc}
- {match: '*layers.0*gate_up*', format: int8-pc}
- {match: '*layers.0*down*', format: %s}
- {match: '*', format: int4-g64}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    def recipe(embedding, floating):
        path = tmp_path_factory.mktemp("recipe") / "mixed.yaml"
        path.write_text(MIXED % (embedding, floating))
        return str(path)

    return recipe


@pytest.fixture(scope="module")
def openelm(recipe, openelm_config):
    """A config and a recipe: tied, and norms of q and k."""
    return openelm_config([4], [2], model_dim=128), recipe("int4-g32", "bf16")


@pytest.fixture(scope="module")
def phi3(recipe, phi3_config):
    """Untied, half of each head rotated, and a window."""
    rotated = {"head_dim": 32, "partial_rotary_factor": 0.5, "sliding_window": 7}
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    return phi3_config(**rotated, **shape), recipe("int8-pc", "fp16")


def logits(file, tokens, name):
    runtime = load_runtime()
    runtime._unsafe_reset_threadpool(1)  # with more, attention may add in another order
    method = runtime._load_program(str(file)).load_method(name)
    rows, at = [], 0
    for size in (16, 1, 9, 14):
        piece = torch.from_numpy(tokens[at : at + size]).reshape(1, -1)
        rows.append(method([piece, torch.tensor([at])])[0].numpy()[0].copy())
        at += size
    return np.concatenate(rows)


@pytest.mark.parametrize("family", ["openelm", "phi3"])
def test_equal_to_the_stock_route(pte, tokens, monkeypatch, request, family):
    config, recipe = request.getfixturevalue(family)
    # The stock route has no product of 4-bit weights with float32 activations.
    monkeypatch.setattr(state, "SMALL", 0)
    # A context of its own: not an artifact with another SMALL. The stock route keeps no columns of
    # large activations in float32.
    ours = pte(config, recipe, 47, activations="int8")
    stock = pte(config, recipe, 47, lowering="stock")
    for name, shape in (("logits_all", (40, 320)), ("forward", (4, 320))):
        wanted = logits(stock.folder / "model.pte", tokens, name)
        found = logits(ours.folder / "model.pte", tokens, name)
        assert wanted.shape == shape and np.ptp(wanted) > 1
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("family", ["openelm", "phi3"])
def test_runs_as_any_other_artifact(pte, run_pte, tokens, request, family):
    stock = pte(*request.getfixturevalue(family), 47, lowering="stock")
    with run_pte(stock.folder, 47) as session:
        every = session.logits(tokens[:47])
        assert session.extend(tokens[:47]).tobytes() == every[46].tobytes()


def test_what_runners_ask_of_it(pte, openelm):
    config, recipe = openelm
    plans = [
        {
            plan["name"]: [
                next(iter(plan["values"][i]["val"].fields.values())) for i in plan["outputs"]
            ]
            for plan in read_pte(made.folder / "model.pte").program["execution_plan"]
            if not plan["inputs"]
        }
        for made in (pte(config, recipe, 47), pte(config, recipe, 47, lowering="stock"))
    ]
    assert plans[0] == plans[1] and plans[0]["get_max_seq_len"] == [16]


def test_integers_and_scales_read_back_are_the_store_s(pte, openelm, phi3):
    for config, recipe in (openelm, phi3):
        made = pte(config, recipe, 47, lowering="stock")
        assert dict(find_target("executorch").stored_digests(made.folder)) == made.store.digests
        assert made.manifest.options == {"lowering": "stock"}


def test_one_flipped_bit_is_seen_in_every_place(pte, openelm, tmp_path):
    config, recipe = openelm
    made = pte(config, recipe, 47, lowering="stock")
    target, wanted = find_target("executorch"), made.store.digests
    whole = (made.folder / "model.pte").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy)
    noted = json.loads((copy / NAMES).read_text())["places"]
    seen = set()
    for tensor in file_tensors(read_pte(copy / "model.pte")):
        place = noted.get(" ".join((tensor.reader, *tensor.key)))
        for part in tensor.parts.values() if place else ():
            data = bytearray(whole)
            data[part.offset + part.nbytes // 2] ^= 4
            (copy / "model.pte").write_bytes(data)
            found = target.stored_digests(copy)
            changed = {name for name in wanted if found[name] != wanted[name]}
            assert changed == set(place["weights"])
            seen |= changed
    assert seen == set(wanted)


def test_names_that_are_damaged(pte, openelm, tmp_path):
    config, recipe = openelm
    made = pte(config, recipe, 47, lowering="stock")
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy)
    noted = json.loads((copy / NAMES).read_text())
    for text in ("", "[]", '{"version": 1}', '{"version": 1, "places": {"a": 3}}'):
        (copy / NAMES).write_text(text)
        with pytest.raises(ExportError, match=r"weight_names\.json cannot be read"):
            find_target("executorch").stored_digests(copy)
    (copy / NAMES).write_text(json.dumps({**noted, "version": 2}))
    with pytest.raises(ExportError, match="this EdgeForge reads 1: export the model again"):
        find_target("executorch").stored_digests(copy)


def test_executorch_missing(checkpoint_of, cache, llama_config, tmp_path, monkeypatch):
    from exporters.options import TargetOptions

    def missing(name):
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    options = pipeline.ExportOptions("fp32", target=TargetOptions(lowering="stock"))
    with pytest.raises(ExportError) as caught:
        pipeline.export(
            checkpoint_of(llama_config()), [find_target("executorch")], tmp_path / "out", options
        )
    assert str(caught.value) == (
        "ExecuTorch is not installed, and --lowering stock lowers with it: pip install "
        '"edgeforge[executorch]"'
    )
    assert not (tmp_path / "out").exists()


def test_parts_of_the_exporter_missing(checkpoint_of, cache, llama_config, tmp_path, monkeypatch):
    """ExecuTorch may be installed without the packages that only its exporter imports."""
    from exporters.options import TargetOptions

    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    options = pipeline.ExportOptions("fp32", target=TargetOptions(lowering="stock"))
    with pytest.raises(ExportError) as caught:
        pipeline.export(
            checkpoint_of(llama_config()), [find_target("executorch")], tmp_path / "out", options
        )
    assert str(caught.value) == (
        "ExecuTorch's exporter needs executorch.exir, which is not installed: pip install "
        '"edgeforge[executorch]"'
    )
