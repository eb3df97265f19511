"""Names, authors and licences are taken from what a checkpoint says, and else left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgeforge.checkpoint.model_card import card_fields, provenance
from edgeforge.model.model import DEMO_FOLDER, open_model
from exporters.target import Provenance


def checkpoint(path, source="folder", revision=None, config=None):
    given = {"source": source, "revision": revision, "config": config or {}}
    return SimpleNamespace(path=path, gguf=None, **given)


def test_the_demo_models_card():
    assert provenance(open_model("demo").checkpoint) == Provenance(
        title=DEMO_FOLDER.name, hub_id="", author="", licence="apache-2.0"
    )


def test_a_checkpoint_from_the_hub(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-1\n---\n\n# Tiny\n"
    )
    given = checkpoint(tmp_path, "acme/tiny-llm", "0123abc")
    assert provenance(given) == Provenance("tiny-llm", "acme/tiny-llm", "acme", "tiny-1")


def test_a_folder_whose_config_says_where_it_came_from(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    named = checkpoint(folder, config={"_name_or_path": "acme/tiny-llm"})
    assert provenance(named) == Provenance("tiny-llm", "acme/tiny-llm", "acme", "")
    for name in ("/home/me/tiny", "./a/b", "tiny", "a/b/c", 3, None):
        other = checkpoint(folder, config={"_name_or_path": name})
        assert provenance(other) == Provenance("copy", "", "", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# No header\n",
        "---\nlicense: mit\n",
        "---\n: [\n---\n",
        "---\n- list\n---\n",
        "---\nlicense: [mit, apache-2.0]\n---\n",
        "---\n" + "[" * 50_000 + "\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
    ],
)
def test_cards_without_a_readable_header(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert card_fields(tmp_path / "README.md") == {}


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_fields(tmp_path / "README.md") == {}
