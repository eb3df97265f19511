"""An output is never what a command reads, nor around it, nor in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edgeforge.errors import UsageError
from edgeforge.output_folder.inputs import Input, refuse_inputs


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (tmp_path / "link").symlink_to("models/m")
    (tmp_path / "models" / "text.txt").touch()
    return folder


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("models/m", "is the checkpoint"),
        ("models/../models/m/", "is the checkpoint"),
        ("link", "is the checkpoint"),
        ("models", "holds the checkpoint"),
        (".", "holds the checkpoint"),
        ("models/m/out", "lies in the checkpoint"),
        ("models/m/a/b/c", "lies in the checkpoint"),
        ("link/out", "lies in the checkpoint"),
    ],
)
@pytest.mark.parametrize("through_link", [False, True])
def test_every_relation_is_refused(model, tmp_path, out, relation, through_link):
    source = tmp_path / "link" if through_link else model
    with pytest.raises(UsageError, match=relation) as caught:
        refuse_inputs(tmp_path / out, [Input("the checkpoint", source, whole=True)])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("out", ["models/m2", "models/out", "out", "models/m/../out"])
def test_a_place_apart_is_taken(model, tmp_path, out):
    refuse_inputs(tmp_path / out, [Input("the checkpoint", model, whole=True)])


def test_a_file_may_lie_beside_the_output_but_not_in_it(model, tmp_path):
    text = [Input("the calibration text", tmp_path / "models" / "text.txt")]
    refuse_inputs(tmp_path / "models" / "out", text)
    with pytest.raises(UsageError, match=r"holds the calibration text .*/text\.txt"):
        refuse_inputs(tmp_path / "models", text)
    with pytest.raises(UsageError, match="is the calibration text"):
        refuse_inputs(tmp_path / "models" / "text.txt", text)


def test_a_hard_link_is_the_same_file(model, tmp_path):
    os.link(tmp_path / "models" / "text.txt", tmp_path / "other.txt")
    with pytest.raises(UsageError, match="is the calibration text"):
        refuse_inputs(
            tmp_path / "other.txt", [Input("the calibration text", model.parent / "text.txt")]
        )


def test_what_is_not_there_yet_is_compared_by_its_path(tmp_path):
    cache = [Input("the cache", tmp_path / "out" / "cache")]
    for out, relation in (("out", "holds"), ("out/cache", "is")):
        with pytest.raises(UsageError, match=relation):
            refuse_inputs(tmp_path / out, cache)
    refuse_inputs(tmp_path / "out" / "cache" / "a", cache)


def test_a_bind_mount_is_the_same_folder(model, tmp_path):
    bound = tmp_path / "bound"
    bound.mkdir()
    mounted = subprocess.run(["mount", "--bind", str(model), str(bound)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a folder, and not everywhere")
    try:
        for out, relation in ((bound, "is"), (bound / "out", "lies in")):
            with pytest.raises(UsageError, match=relation):
                refuse_inputs(out, [Input("the checkpoint", model, whole=True)])
    finally:
        subprocess.run(["umount", str(bound)], check=True)
