"""An artifact of a module in a process of its own: what it gives, and what its crash comes to."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from device_harness import module_worker
from device_harness.errors import DeviceError, WorkerEndedError
from device_harness.module_session import ModuleSession
from edgeforge import api

pytestmark = pytest.mark.artifact


class Net(nn.Module):
    """Two dtypes in and two out, one of them of no axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 16)

    def forward(self, x, mask):
        found = self.linear(x) * mask
        return found, found.argmax()


X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
MASK = np.array([[True], [False]])


@pytest.fixture(scope="module", params=["onnx", "executorch"])
def artifact(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        given = (torch.from_numpy(X), torch.from_numpy(MASK))
        options = {"targets": [request.param], "recipe": "fp32"}
        (folder,) = api.export_module(Net(), given, root / "net", **options)
    return folder


def test_it_computes_what_torch_does_and_is_timed(artifact):
    with ModuleSession(artifact, 1, {"x": X, "mask": MASK}) as session, torch.no_grad():
        wanted = Net()(torch.from_numpy(X), torch.from_numpy(MASK))
        found = session.run({"x": X, "mask": MASK})
        assert found["output_1"].shape == () and found["output_1"] == wanted[1].numpy()
        np.testing.assert_allclose(found["output_0"], wanted[0].numpy(), atol=1e-6)
        timed = session.timed(np.zeros(1, np.int64), 1)
        assert timed.first_token_seconds > 0 and timed.peak_bytes > 1 << 20
        assert 1 <= len(timed.step_seconds) <= module_worker.MOST_CALLS
        np.testing.assert_array_equal(session.outputs["output_0"], found["output_0"])
        assert session.load()["seconds"] > 0
        assert "1 threads" in session.runtime
    with pytest.raises(DeviceError, match="this session is closed"):
        session.run({"x": X, "mask": MASK})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_of_the_runtime_is_one_sentence(artifact, number):
    with ModuleSession(artifact) as session:
        session.load()
        os.kill(session._line._channel._process.pid, number)
        word = "killed" if number == signal.SIGKILL else "SIGSEGV"
        with pytest.raises(WorkerEndedError, match=rf"host: the worker .*{word}.* in running "):
            session.run({"x": X, "mask": MASK})
