"""Single files: whole or as they were, and never through somebody's link."""

from __future__ import annotations

import pytest

from edgeforge.output_folder.whole_file import whole_file


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    final = tmp_path / "a"
    final.write_text("old")
    with pytest.raises(RuntimeError), whole_file(final) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert final.read_text() == "old"
    with whole_file(final) as stream:
        stream.write(b"new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"


@pytest.mark.parametrize("name", ["a", ".a.partial"])
def test_a_link_is_replaced_and_not_written_through(tmp_path, name):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / name).symlink_to("thesis")
    with whole_file(tmp_path / "a") as stream:
        stream.write(b"new")
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_text() == "new"
