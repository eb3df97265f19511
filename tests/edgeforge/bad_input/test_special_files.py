"""Pipes, devices and the kernel's files in the place of every file that a command reads."""

import os
import signal

import pytest

USAGE, CHECKPOINT, QUANTIZATION, EXPORT, DEVICE = 2, 3, 4, 5, 6
REGULAR = "and EdgeForge reads regular files only"


@pytest.fixture(autouse=True)
def no_waiting():
    """Ends a command that waits for a pipe's writer."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def kernels(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/environ")
    return path


def zeros(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("special", [pipe, kernels, zeros])
def test_files_that_the_user_names(sound, sound_artifact, refuses, tmp_path, special):
    export = ("export", sound, "-o", tmp_path / "out", "-q")
    recipe, text = special(tmp_path / "recipe.yaml"), special(tmp_path / "text.txt")
    refuses(QUANTIZATION, "recipe.yaml", REGULAR, command=(*export, "--recipe", recipe))
    calibrated = (*export, "--recipe", "int4-gptq", "--calibration", text)
    refuses(USAGE, "text.txt", REGULAR, command=calibrated)
    refuses(USAGE, REGULAR, command=("verify", sound_artifact, "-q", "--text", text))
    refuses(EXPORT, REGULAR, command=("coreml-run", special(tmp_path / "model.mlmodel")))


@pytest.mark.parametrize("special", [pipe, kernels, zeros])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_files_of_a_checkpoint(checkpoint, export, special, name):
    special(checkpoint / name)
    export(checkpoint, CHECKPOINT, name)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_a_checkpoint_is_not_taken_for_nothing(checkpoint, export, name):
    pipe(checkpoint / name)
    export(checkpoint, CHECKPOINT, name, REGULAR)


@pytest.mark.parametrize("special", [pipe, kernels, zeros])
def test_a_manifest(artifact, refuses, special):
    special(artifact / "edgeforge.json")
    for command in (("inspect", artifact), ("run", artifact, "-p", "x"), ("verify", artifact)):
        refuses(EXPORT, "edgeforge.json", REGULAR, command=command)


@pytest.mark.parametrize("special", [pipe, kernels, zeros])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_model_and_its_weights(artifact, edgeforge, special, name):
    special(artifact / name)
    for command, code in ((("inspect", artifact), 1), (("run", artifact, "-p", "x"), DEVICE)):
        shown = edgeforge(*command)
        assert shown.code == code and shown.err.count("\n") == 1
        assert name in shown.err
        assert REGULAR in shown.err or "bytes; " in shown.err


@pytest.mark.usefixtures("warm")
def test_a_model_card_that_is_a_pipe_is_not_read(checkpoint, edgeforge, tmp_path):
    pipe(checkpoint / "README.md")
    assert edgeforge("export", checkpoint, "-o", tmp_path / "out", "-q").code == 0
