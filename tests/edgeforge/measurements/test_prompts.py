"""Prompts are text where there is a tokenizer, and in the vocabulary in any case."""

from __future__ import annotations

import shutil

import numpy as np

from edgeforge.measurements.prompts import Prompts
from edgeforge.model.model import DEMO_FOLDER, HELDOUT
from edgeforge.tokenizer import Tokenizer
from exporters.manifest import Manifest


def test_a_prompt_is_the_beginning_of_the_held_out_text(artifacts, tmp_path):
    folder = shutil.copytree(artifacts.int4, tmp_path / "with text")
    shutil.copy(DEMO_FOLDER / "tokenizer.json", folder)
    prompts = Prompts(folder, Manifest.read(folder))
    whole = Tokenizer(folder / "tokenizer.json", "it").encode(HELDOUT.read_text()[:20_000])
    vocab_size = Manifest.read(folder).model.vocab_size
    for count in (1, 7, 300):
        found = prompts.of(count)
        assert found.shape == (count,) and found.dtype == np.int64
        assert found.max() < vocab_size
        known = np.array(whole[:count]) < vocab_size  # the demo's tokenizer knows more than it
        assert (found[known] == np.array(whole[:count])[known]).all()


def test_without_a_tokenizer_it_is_seeded(artifacts):
    manifest = Manifest.read(artifacts.int4)
    one, other = (Prompts(artifacts.int4, manifest) for _ in range(2))
    assert (one.of(50) == other.of(50)).all()
    assert len(set(one.of(50).tolist())) > 10
