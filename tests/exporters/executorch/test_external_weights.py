"""Weights in a .ptd: the same logits to the bit, in a file that ExecuTorch reads itself."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from device_harness.errors import DeviceError
from device_harness.executorch_worker import load_method, load_runtime
from exporters.errors import ExportError
from exporters.executorch import state
from exporters.executorch.ptd_file import MARK
from exporters.executorch.reader import read_parts, read_pte
from exporters.registry import find_target

DIMS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
CASES = [
    ("int4-g32", True, False),
    ("int4-g32", True, True),
    ("int4-g32", False, False),
    ("int4-pc", True, False),
    ("int8-pc", True, False),
    ("fp16", True, False),
    ("bf16", True, False),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, pte, llama_config):
    """The same export with weights inside and outside; ``small``: with exact products."""
    format, tied, small = request.param
    # No other test has this epsilon, and so none is given these artifacts or gives its own.
    config = llama_config(tie_word_embeddings=tied, rms_norm_eps=3e-5 if small else 4e-5, **DIMS)
    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr(state, "SMALL", 0)
        return pte(config, format), pte(config, format, weights="external"), tied and not small


@pytest.fixture(scope="module")
def external(pte, llama_config):
    return pte(llama_config(tie_word_embeddings=True, **DIMS), "int8-pc", weights="external")


def test_the_logits_are_the_same_bits(pair, tokens):
    runtime, found = load_runtime(), []
    runtime._unsafe_reset_threadpool(1)  # with more, attention may add in another order
    for made, weights in ((pair[0], ""), (pair[1], str(pair[1].folder / "model.ptd"))):
        rows = []
        for name in ("forward", "logits_all"):
            method = load_method(runtime, str(made.folder / "model.pte"), weights, name)
            for at, size in ((0, 16), (16, 1), (17, 9)):
                piece = torch.from_numpy(tokens[at : at + size]).reshape(1, -1)
                rows.append(method([piece, torch.tensor([at])])[0].numpy().tobytes())
        found.append(rows)
    assert found[0] == found[1]


def test_a_session_finds_them(external, run_pte, tokens):
    with run_pte(external.folder) as session:
        logits = session.extend(tokens[:20])
        assert np.abs(session.logits(tokens[:20])[19] - logits).max() < 1e-4 * np.ptp(logits)


def test_executorch_itself_reads_them(pair):
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    _, made, shared = pair
    read = FlatTensorSerializer().deserialize(Cord((made.folder / "model.ptd").read_bytes()))
    name = "model.embed_tokens.weight"
    norm = read.named_data["model.norm.weight"]
    stored = made.store.part("model.norm.weight", "value").float().numpy()
    if "model.norm.weight widened" not in read.named_data:
        assert read.buffers[norm.buffer_index] == stored.tobytes()
    tables = [key for key, entry in read.named_data.items() if entry.tensor_layout is not None]
    assert tables and all(key.startswith(name) for key in tables)
    for key in tables:
        layout = read.named_data[key].tensor_layout
        assert layout.sizes[0] == 320 and layout.dim_order == list(range(len(layout.sizes)))
    heads = [key for key in read.named_data if key == f"{name} codes"]
    if shared and heads:
        rows = next(key for key in tables if " rows" in key)
        found = [read.named_data[key].buffer_index for key in (rows, *heads)]
        assert len(set(found)) == 1


def test_what_is_read_back_is_what_was_stored(pair):
    for made in pair[:2]:
        assert find_target("executorch").stored_digests(made.folder) == made.store.digests


def test_a_tied_table_is_stored_once(pair):
    _, made, shared = pair
    name = "model.embed_tokens.weight"
    opened = read_pte(made.folder / "model.pte")
    places = {at for key, at in opened.weights.named.items() if key.startswith(name)}
    stored = sum(size for _, size in places)
    parts = made.store.extents(name)
    if shared:
        wanted = sum(part.nbytes for part in parts.values())
        # XNNPACK's scale of a row is float32, and so is a bfloat16 weight.
        per_row = "scale" in parts and parts["scale"].shape[1] == 1
        wanted += parts["scale"].nbytes if per_row else 0
        wanted += (
            parts["value"].nbytes if "value" in parts and parts["value"].dtype == "BF16" else 0
        )
        assert stored == wanted
    whole = sum(size for _, size in set(opened.weights.named.values()))
    assert (made.folder / "model.ptd").stat().st_size < whole + 128 * len(
        opened.weights.named
    ) + 4096


def test_the_program_holds_no_weight(pair):
    opened = read_pte(pair[1].folder / "model.pte")
    keys = [row["key"] for row in opened.program["named_data"]]
    assert keys and not any(".weight" in key for key in keys)
    places = [place for parts in read_parts(opened).values() for p in parts.values() for place in p]
    files = {part.file.name for place in places for part in getattr(place, "groups", (place,))}
    assert files == {"model.ptd"}


def test_one_flipped_bit_is_seen(pair, tmp_path):
    made = pair[1]
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy)
    whole = (copy / "model.ptd").read_bytes()
    for weight, parts in read_parts(read_pte(copy / "model.pte")).items():
        place = next(iter(parts.values()))[0]
        place = getattr(place, "groups", (place,))[0]
        assert place.file == copy / "model.ptd"
        data = bytearray(whole)
        data[place.offset + place.nbytes // 2] ^= 4
        (copy / "model.ptd").write_bytes(data)
        found = find_target("executorch").stored_digests(copy)
        wrong = {name for name, digest in made.store.digests.items() if found[name] != digest}
        assert wrong == {weight}


def test_the_columns_of_a_pair_are_exchanged_back(pte, run_pte, llama_config, tmp_path, tokens):
    """Against QUANTIZED, whose pairs are in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SMALL", 0)
        recipe = tmp_path / "r.yaml"
        recipe.write_text("- {match: embedding, format: int4-g32}\n- {match: '*', format: fp32}\n")
        made = pte(llama_config(tie_word_embeddings=True, **DIMS), str(recipe), weights="external")
    plan = read_pte(made.folder / "model.pte")
    assert any(key.endswith("rows as the head's") for key in plan.weights.layouts)
    codes = made.store.part("model.embed_tokens.weight", "codes")
    assert ((codes & 15) != (codes >> 4)).float().mean() > 0.5  # an exchange would show
    wanted = made.quantized_logits(tokens[:20])
    with run_pte(made.folder) as session:
        assert np.abs(session.logits(tokens[:20]) - wanted).max() < 0.04 * np.ptp(wanted)


def damaged(made, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(made.folder, copy)
    change(copy / "model.ptd")
    return copy


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def mark(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(MARK.encode(), b"edgeforge weight5"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda path: path.unlink(),
            r"model\.ptd cannot be read: No such file or directory; the p",
        ),
        (cut, r"model\.ptd was cut short: it has \d+ bytes and not \d+"),
        (zeros, r"model\.ptd holds no weights of the schema FT01"),
        (lambda path: path.write_bytes(b""), r"model\.ptd holds no weights of the schema FT01"),
        (mark, r"model\.ptd holds weights of another export than model\.pte: put the one there"),
    ],
)
def test_a_damaged_one_is_one_sentence(external, run_pte, tmp_path, change, words):
    copy = damaged(external, tmp_path, change)
    with pytest.raises(ExportError, match=words) as caught:
        find_target("executorch").stored_digests(copy)
    with pytest.raises(DeviceError, match=words) as at_run, run_pte(copy) as session:
        session.load()
    assert "\n" not in str(caught.value) + str(at_run.value)


def test_one_of_another_model_is_known(external, pte, run_pte, llama_config, tmp_path):
    other = pte(llama_config(tie_word_embeddings=True, **DIMS), "int4-pc", weights="external")
    copy = damaged(external, tmp_path, lambda p: shutil.copy(other.folder / "model.ptd", p))
    with pytest.raises(DeviceError, match="weights of another export"), run_pte(copy) as session:
        session.load()


def test_tables_damaged_at_random_are_one_sentence(external, tmp_path):
    copy = damaged(external, tmp_path, lambda path: None)
    whole = (copy / "model.ptd").read_bytes()
    draw = np.random.default_rng(0)
    end = int.from_bytes(whole[32:40], "little")  # where segments begin
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for at in draw.integers(56, end, 4):
            data[at] = draw.integers(0, 256)
        (copy / "model.ptd").write_bytes(data)
        try:
            read_parts(read_pte(copy / "model.pte"))
        except ExportError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20
