"""A module of one layer of each kind, written for every target and verified in its runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeforge import api
from edgeforge.errors import CheckFailed, UsageError
from exporters.errors import ExportError
from exporters.manifest import MODULE_MANIFEST, Manifest, record_files
from exporters.modules.manifest import ModuleManifest
from exporters.modules.registry import MODULE_TARGETS


class Net(nn.Module):
    """Images and tokens in; scores, and the image's features, out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.table = nn.Embedding(40, 64)
        self.first = nn.Linear(64, 64)
        self.last = nn.Linear(80, 10, bias=False)

    def forward(self, pixels, tokens, scale=2.0):
        image = torch.relu(self.norm(self.conv(pixels)))
        # Neither pooling has a stride of its own, which is then the kernel's size.
        image = F.avg_pool2d(F.max_pool2d(image, 2), 2).mean((2, 3))
        text = F.gelu(self.first(self.table(tokens)).mean(1))
        scores = self.last(torch.cat([image, text], 1)) * scale
        return {"scores": scores, "parts": (image, None)}


def example():
    torch.manual_seed(1)
    return {"pixels": torch.randn(2, 3, 16, 16), "tokens": torch.randint(0, 40, (2, 5))}


def shapes():
    batch, length = torch.export.Dim("batch", max=4), torch.export.Dim("length", max=16)
    return {"pixels": {0: batch}, "tokens": {0: batch, 1: length}}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    root = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        net = Net()
        api.export_module(
            net, example(), root / "net", dynamic_shapes=shapes(), targets=list(MODULE_TARGETS)
        )
        assert net.training, "the module's own mode comes back"
        yield root / "net"


@pytest.mark.parametrize("target", MODULE_TARGETS)
def test_each_target_computes_the_module(artifacts, target):
    found = api.verify_module(artifacts / target)
    assert found.not_run == "" and found.samples == 2
    assert [each.name for each in found.outputs] == ["scores", "parts_0"]
    for each in found.outputs:
        assert 0 < each.quantization < 0.03
        assert each.lowering < {"onnx": 0.02, "coreml": 0.005, "executorch": 0.02}[target]
        assert each.cosine > 0.999
    assert json.loads((artifacts / target / "report.json").read_text())["target"] == target


def test_all_targets_hold_the_same_integers(artifacts):
    read = {target: ModuleManifest.read(artifacts / target) for target in MODULE_TARGETS}
    onnx = read["onnx"]
    assert set(onnx.weights) == {"conv.weight", "table.weight", "first.weight", "last.weight"}
    assert all(each.weights == onnx.weights for each in read.values())
    assert not any(each.floats for each in read.values())
    assert onnx.inputs == {"pixels": "float32[batch, 3, 16, 16]", "tokens": "int64[batch, length]"}
    assert onnx.outputs == {"scores": "float32[batch, 10]", "parts_0": "float32[batch, 16]"}
    assert onnx.ranges == {"batch": "1..4", "length": "1..16"}


def test_changed_integers_are_found(artifacts, tmp_path):
    for target, file in (("onnx", "model.onnx.data"), ("executorch", "model.pte")):
        folder = shutil.copytree(artifacts / target, tmp_path / target)
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)
        with pytest.raises(CheckFailed, match="was changed after it was written"):
            api.verify_module(folder)


@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_integers_are_read_back_from_the_file_itself(artifacts, target):
    manifest = ModuleManifest.read(artifacts / target)
    found = MODULE_TARGETS[target].stored_digests(artifacts / target, manifest.entry, {})
    wanted = {n: w.digest for n, w in manifest.weights.items() if n not in manifest.floats}
    assert found == wanted


def test_commands_take_artifacts_of_modules(artifacts, edgeforge, tmp_path):
    shown = edgeforge("verify", artifacts / "onnx", "-q")
    assert shown.code == 0 and "4 weights read back" in shown.out
    shown = edgeforge("inspect", artifacts / "onnx")
    assert shown.code == 0 and "conv.weight: int8-pc" in shown.out
    shown = edgeforge("run", artifacts / "onnx", "-p", "a")
    assert shown.code == 5 and "an artifact of a module" in shown.err
    with pytest.raises(ExportError, match="inspect, check, bench and compare take it"):
        Manifest.read(artifacts / "onnx")


def test_a_program_that_crashes_the_runtime_is_one_sentence(artifacts, edgeforge, tmp_path):
    folder = shutil.copytree(artifacts / "executorch", tmp_path / "crashing")
    data = bytearray((folder / "model.pte").read_bytes())
    data[100:500] = b"\x7f" * 400  # offsets of tables, which ExecuTorch follows unchecked
    (folder / "model.pte").write_bytes(data)
    manifest = ModuleManifest.read(folder)
    (folder / MODULE_MANIFEST).unlink()
    replace(manifest, files=record_files(folder)).write(folder)
    shown = edgeforge("verify", folder, "-q")
    assert shown.code == 6 and shown.out == "" and shown.err.count("\n") == 1
    assert "host: the worker ended with SIGSEGV in opening " in shown.err


def test_four_bits_where_groups_fit_and_given_inputs(artifacts, tmp_path):
    given = {
        "pixels": np.zeros((1, 3, 16, 16), np.float32),
        "tokens": np.arange(7, dtype=np.int64)[None],
    }
    options = {"dynamic_shapes": shapes(), "recipe": "int4-g32", "inputs": [given]}
    (folder,) = api.export_module(Net(), example(), tmp_path / "out", **options)
    found = api.verify_module(folder)
    assert found.samples == 1 and found.failures == ()
    formats = {n: w.format for n, w in ModuleManifest.read(folder).weights.items()}
    # 80 columns are no multiple of 32, and kernels of convolutions have 8 bits.
    assert formats == {
        "conv.weight": "int8-pc",
        "table.weight": "int4-g32",
        "first.weight": "int4-g32",
        "last.weight": "int8-pc",
    }
    with pytest.raises(UsageError, match=r"pixels is float64\[1, 3, 16, 16\]; the module takes"):
        options["inputs"] = [{**given, "pixels": given["pixels"].astype(np.float64)}]
        api.export_module(Net(), example(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_floats_are_exact(artifacts, tmp_path):
    (folder,) = api.export_module(Net(), example(), tmp_path / "out", recipe="fp32")
    found = api.verify_module(folder)
    assert found.integers == 0
    assert all(e.quantization == 0 and e.lowering < 1e-5 for e in found.outputs)


class Block(nn.Module):
    """What MobileNet begins with: zeros behind an image, a convolution, and a block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.project = nn.Conv2d(32, 16, 1, bias=False)

    def forward(self, x):
        x = F.relu6(self.stem(F.pad(x, (0, 1, 0, 1))))
        wide = F.relu6(self.expand(x))
        return x + self.project(F.relu6(self.norm(self.depthwise(wide))))


class FrontEnd(nn.Module):
    """What Whisper's encoder begins with: convolutions of a sequence, and positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(16, 32, 3, padding=1)
        self.second = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.positions = nn.Embedding(10, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        x = F.gelu(self.second(F.gelu(self.first(x)))).permute(0, 2, 1)
        return self.last(x + self.positions.weight)


@pytest.mark.parametrize(
    ("made", "size", "floats"),
    [(Block, (3, 16, 16), {"depthwise.weight"}), (FrontEnd, (16, 20), set())],
)
def test_convolutions_are_the_same_integers_everywhere(made, size, floats, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    batch = {"x": {0: torch.export.Dim("batch", max=4)}}
    given, targets = torch.randn(2, *size), list(MODULE_TARGETS)
    folders = api.export_module(
        made(), given, tmp_path / "out", targets=targets, dynamic_shapes=batch
    )
    for folder in folders:
        manifest = ModuleManifest.read(folder)
        on_executorch = manifest.target == "executorch"
        assert set(manifest.floats) == (floats if on_executorch else set())
        found = api.verify_module(folder)
        assert found.integers == len(manifest.weights) - len(manifest.floats)
        assert found.outputs[0].lowering < 0.02
        wanted = {n: w.digest for n, w in manifest.weights.items() if n not in manifest.floats}
        if manifest.target != "onnx":
            read = MODULE_TARGETS[manifest.target].stored_digests(folder, manifest.entry, {})
            assert read == wanted
    digests = [{n: w.digest for n, w in ModuleManifest.read(f).weights.items()} for f in folders]
    assert digests[0] == digests[1] == digests[2]


def test_all_convolutions_that_xnnpack_has_kernels_for_run_there(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))

    class Convolving(nn.Module):
        """Images, a depthwise and a grouped convolution, sequences, and an even kernel."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gray = nn.Conv2d(1, 16, 3, stride=2, padding=1)
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.grouped = nn.Conv2d(16, 32, 4, padding="same", groups=2, bias=False)
            self.sequence = nn.Conv1d(32, 16, 3)
            self.causal = nn.Conv1d(16, 16, 4, padding="same", dilation=3)

        def forward(self, x):
            x = torch.relu(self.depthwise(torch.relu(self.gray(x))))
            x = self.sequence(self.grouped(x).flatten(2))
            # Without a batch dimension: torch takes the first of the batch for all of it.
            return self.causal(x[0])

    batch = {"x": {0: torch.export.Dim("batch", max=4)}}
    given = torch.randn(2, 1, 12, 12) * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    options = {"targets": ["executorch"], "dynamic_shapes": batch}
    (folder,) = api.export_module(Convolving(), given, tmp_path / "out", **options)
    manifest = ModuleManifest.read(folder)
    assert set(manifest.floats) == {"gray.weight", "depthwise.weight"}
    assert "XNNPACK's depthwise kernels" in manifest.floats["gray.weight"]
    found = api.verify_module(folder)
    assert found.integers == 3 and found.outputs[0].lowering < 0.02
    # ExecuTorch's portable kernels compute no convolution: they are far slower.
    assert b"aten::convolution" not in (folder / "model.pte").read_bytes()
    # Channels lie last in the file; what was read back is the store's, undone.
    places = json.loads((folder / "weight_places.json").read_text())["places"]
    assert places["grouped.weight"]["codes"][0]["layout"].endswith("channels last, taps 16")


def test_what_xnnpacks_partitioner_fails_on_runs_in_portable_kernels(artifacts, tmp_path):
    class Mixed(nn.Module):
        """Convolves an image, and takes its pixels as a sequence."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.image, self.slope, self.last = nn.Conv2d(3, 8, 3), nn.PReLU(), nn.Linear(8, 12)

        def forward(self, x):
            return self.last(self.slope(self.image(x).flatten(2)).mean(-1))

    given = (torch.randn(1, 3, 6, 6),)
    (folder,) = api.export_module(Mixed(), given, tmp_path / "out", targets=["executorch"])
    notes = ModuleManifest.read(folder).notes
    assert any("XNNPACK's partitioner failed (" in note for note in notes)
    found = api.verify_module(folder)
    assert found.failures == () and found.integers == 1


def test_a_process_that_imported_nothing_else_writes_embeddings_for_executorch(tmp_path):
    script = (
        "import sys, torch\n"
        "from edgeforge import api\n"
        "net = torch.nn.Embedding(40, 64)\n"
        "api.export_module(net, torch.tensor([[1, 2]]), sys.argv[1], targets=['executorch'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    environment = {**os.environ, "EDGEFORGE_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, env=environment)
    assert api.verify_module(tmp_path / "out").integers == 1
