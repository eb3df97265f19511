"""What `edgeforge doctor` tells of an installation."""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import replace

import pytest

from edgeforge.cli import doctor
from edgeforge.cli.doctor import Kernels, Package, Report, TargetReport, report_lines
from exporters.registry import TARGETS
from quant.kernels import native

WORKS = TargetReport(None, "a runtime 1.0 (CPU, 2 threads)", None)
MISSING = TargetReport(
    None,
    None,
    'onnxruntime is not installed, and this artifact runs in it: pip install "edgeforge[onnx]"',
)
BROKEN = TargetReport("ImportError: libonnx.so is damaged", None, "there is no artifact to run")
REPORT = Report(
    edgeforge="1.2.3",
    python="3.11.7",
    system="Linux 6.1 x86_64",
    processor="A Processor of 64 Cores",
    cores=2,
    memory_bytes=16_000_000_000,
    cache_folder="/home/me/.cache/edgeforge",
    cache_bytes=1_500_000,
    kernels=Kernels(True, "AVX2", None),
    packages=(
        Package("torch", "2.13.0", ">=2.13,<2.15", None, True),
        Package("onnxruntime", None, ">=1.22", "onnx", True),
        Package("executorch", "1.5.0", "==1.4.1", "executorch", False),
        Package("coremltools", "9.0", ">=9.0", "coreml", True),
        Package("onnxruntime-genai", None, ">=0.18", "genai", True),
    ),
    targets={"onnx": MISSING, "coreml": WORKS, "executorch": WORKS},
)


@pytest.mark.artifact
def test_this_installation(edgeforge, monkeypatch, tmp_path):
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "a").write_bytes(bytes(1234))
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path))
    shown = edgeforge("doctor", "--json")
    assert shown.code == 0
    found = json.loads(shown.out)
    assert found["export_works"] is True
    assert found["edgeforge"] == importlib.metadata.version("edgeforge")
    assert found["cache_folder"] == str(tmp_path) and found["cache_bytes"] == 1234
    assert found["kernels"]["built"] is native.available()
    assert found["cores"] == len(os.sched_getaffinity(0))
    for package in found["packages"]:
        assert package["version"] == importlib.metadata.version(package["name"])
        assert package["fits"] is True
    assert set(found["targets"]) == set(TARGETS)
    for target, runtime in (("onnx", "onnxruntime 1."), ("executorch", "executorch 1.4.1 ")):
        assert found["targets"][target]["export_error"] is None
        assert found["targets"][target]["runtime"].startswith(runtime)


def test_packages_are_those_of_the_project(monkeypatch):
    asked = [
        "torch<2.15,>=2.13",
        'onnxruntime>=1.22; extra == "onnx"',
        'edgeforge[coreml,executorch,genai,onnx]; extra == "all"',
        'executorch==1.4.1; extra == "executorch"',
        'torch<2.14,>=2.13; extra == "executorch"',
        'pytest>=9.2; extra == "dev"',
    ]
    installed = {"torch": "2.14.0+cpu", "executorch": "1.5.0", "pytest": "9.2.0"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "requires", lambda name: asked)
    monkeypatch.setattr(doctor, "version", version)
    assert doctor.packages() == (
        Package("torch", "2.14.0+cpu", "<2.15,>=2.13", None, True),
        Package("onnxruntime", None, ">=1.22", "onnx", True),
        Package("executorch", "1.5.0", "==1.4.1", "executorch", False),
        Package("torch", "2.14.0+cpu", "<2.14,>=2.13", "executorch", False),
    )


def test_every_runtime_of_the_project_has_an_extra_that_is_explained():
    extras = {each.extra for each in doctor.packages()}
    assert extras == {None, *doctor.EXTRAS}


def test_the_verdict_comes_first_and_every_line_fits_80_columns():
    lines = "\n".join(report_lines(REPORT)).splitlines()
    assert lines[:2] == [
        "Exporting works here to: onnx, coreml, executorch.",
        "Running works here for: coreml, executorch.",
    ]
    assert max(map(len, lines)) <= 80
    assert "processor  A Processor of 64 Cores, 2 cores, 16.00 GB of memory" in lines
    assert "kernels    compiled; instruction set: AVX2" in lines
    assert "cache      /home/me/.cache/edgeforge, 1.5 MB" in lines


def test_what_is_missing_and_how_to_get_it():
    text = "\n".join(report_lines(REPORT))
    assert 'onnx: runs ONNX artifacts: pip install "edgeforge[onnx]"\n' in text
    assert "  onnxruntime        not installed\n" in text
    assert "  executorch         1.5.0, but EdgeForge needs ==1.4.1\n" in text
    assert " ".join(text.split()).count('it: pip install "edgeforge[onnx]"') == 1


def test_exporting_that_does_not_work_is_exit_code_1(edgeforge, monkeypatch):
    broken = replace(REPORT, targets={"onnx": BROKEN, "coreml": WORKS, "executorch": BROKEN})
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    words = "exporting to onnx, executorch fails: ImportError: libonnx.so is damaged"
    shown = edgeforge("doctor")
    assert shown.code == 1
    assert shown.err.splitlines()[-1] == f"edgeforge: {words}"
    assert shown.out.startswith("Exporting works here to: coreml.\n")
    shown = edgeforge("doctor", "--json")
    assert shown.code == 1 and json.loads(shown.out)["export_works"] is False


def test_a_missing_runtime_is_no_failure(edgeforge, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: REPORT)
    assert edgeforge("doctor").code == 0


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        (Kernels(False, None, None), "not compiled, so quantization runs in PyTorch"),
        (Kernels(None, None, "its process ended by SIGILL"), "could not be tried: its process"),
    ],
)
def test_kernels_that_are_not_there(kernels, words):
    assert words in "\n".join(report_lines(replace(REPORT, kernels=kernels)))


def test_a_folder_that_was_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert doctor.packages() == ()
    text = "\n".join(report_lines(replace(REPORT, edgeforge=None, packages=())))
    assert "edgeforge  runs from a folder, not installed as a package" in text


def test_links_in_the_cache_are_not_followed(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "file").write_bytes(bytes(100))
    (outside / "large").write_bytes(bytes(100_000))
    (inside / "link").symlink_to(outside)
    (inside / "dangling").symlink_to(tmp_path / "nowhere")
    assert 100 <= doctor.folder_bytes(inside) < 1000
    assert doctor.folder_bytes(tmp_path / "nowhere") == 0
