"""The tokens that end a text: the configuration's, and the chat template's, in every file."""

from types import SimpleNamespace

import pytest

from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.identity import hold_identity


def checked(tmp_path, recorded, in_files):
    """The verdicts of ``eos`` and ``pad`` for a model whose template adds the end 9 to 2."""
    checkpoint = SimpleNamespace(tokenizer_files={}, named_tokenizer="")
    spec = SimpleNamespace(bos=1, eos=(2,), pad=None)
    model = SimpleNamespace(checkpoint=checkpoint, spec=spec, eos=(2, 9))
    manifest = SimpleNamespace(model=SimpleNamespace(bos=1, eos=recorded), context=8)
    reading = SimpleNamespace(ids={"eos": in_files, "pad": (2,)}, context={})
    findings = Findings()
    hold_identity(tmp_path, manifest, model, reading, findings)
    found = {check.name: check.verdict for check in findings.checks()}
    return found["eos"], found["pad"]


@pytest.mark.parametrize(
    ("recorded", "in_files", "is_right"),
    [
        ((2, 9), (2, 9), True),
        ((2,), (2,), True),  # an artifact of before
        ((2, 9), (2,), False),
        ((2,), (2, 9), False),
        ((9,), (9,), False),
    ],
)
def test_the_files_state_what_the_manifest_and_the_checkpoint_do(
    tmp_path, recorded, in_files, is_right
):
    eos, pad = checked(tmp_path, recorded, in_files)
    assert (eos, pad) == ("passed" if is_right else "failed", "passed")
