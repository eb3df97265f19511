"""Spoils files of every kind that EdgeForge reads, and counts what becomes of each.

Sound checkpoints, artifacts, recipes and texts are made first. Then each mutation spoils one file,
brings the manifest's digests up to date so that the readers behind the check are reached too, and
reads it in a process of its own, within bounds of time and memory. What may become of it: it is
accepted, or refused by one sentence with an exit code. A traceback, and an end by a bound, are
faults; the seed and the number in the table's footnotes give the same file again.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutations import BYTES, GGUF, JSON, MIL, ONNX, YAML_TEXT, Mutation, special_file

# Of a processor's time, and of any time: a busy machine must not make a reader look slow.
SECONDS, PATIENCE = 10, 30
MEMORY = 1 << 30
# One of so many mutations replaces the file by a pipe, a device, a folder or a link.
SPECIAL = 25
COLUMNS = ("accepted", "sentence", "traceback", "too long", "too much memory", "crash")
RECIPE = """# a plan
rotation: hadamard
rules:
- {match: '*.down_proj.weight', format: int4-g32 | int8-pc, algorithm: gptq-order}
- {match: 'model.layers.0.*', format: int8-pc}
- {match: '*', format: int4-g32, activation: none}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        seed: the folder of sound files, of which a copy is spoiled.
        files: which of them to spoil.
        mutations: how.
        read: reads the copy as a command would.
        sealed: whether the digests of ``edgeforge.json`` are brought up to date.
    """

    seed: str
    files: tuple[str, ...]
    mutations: tuple[Mutation, ...]
    read: Callable[[Path], None]
    sealed: bool = False


def command(*arguments: str) -> Callable[[Path], None]:
    """Runs a command on the folder; ``@`` in an argument stands for it."""

    def read(folder: Path) -> None:
        from edgeforge.cli import entry

        sys.argv = ["edgeforge", *(word.replace("@", str(folder)) for word in arguments)]
        entry.main()

    return read


def called(function: Callable[[Path], object]) -> Callable[[Path], None]:
    """Calls a reader on the folder; its errors end as they end a command."""

    def read(folder: Path) -> None:
        from edgeforge.cli.exits import explain, one_line

        try:
            function(folder)
        except Exception as error:
            explained = explain(error)
            if explained is None:
                raise
            print(f"edgeforge: {one_line(explained[1])}", file=sys.stderr)
            sys.exit(explained[0])

    return read


def _checkpoint(folder: Path) -> None:
    from edgeforge.model.model import open_model

    open_model(str(folder))


def _gguf(folder: Path) -> None:
    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.families.registry import read_spec

    checkpoint = Checkpoint.open(folder / "model.gguf")
    read_spec(checkpoint.config, checkpoint.generation_config)


def _recipe(folder: Path) -> None:
    from quant.plans.recipes import find_recipe

    layer = "model.layers.0.mlp"
    roles = {f"{layer}.{name}_proj.weight": "linear" for name in ("gate", "down")}
    roles |= {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    find_recipe(str(folder / "recipe.yaml")).plan(dict.fromkeys(roles, (64, 64)), roles)


def _calibration(folder: Path) -> None:
    from edgeforge.calibration.text import CalibrationOptions, draw_calibration
    from edgeforge.model.model import open_model

    options = CalibrationOptions(str(folder / "text.txt"), tokens=256, length=64)
    draw_calibration(open_model("demo"), options, 64)


def _weight_names(folder: Path) -> None:
    from exporters.executorch.stock.names import stored_digests

    stored_digests(folder / "model.pte")


def _store(folder: Path) -> None:
    from quant.store.store import WeightStore

    WeightStore(folder)


MLMODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHT_BIN = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
INSPECT = command("inspect", "@", "--json")
KINDS: dict[str, Kind] = {
    "manifest of ONNX": Kind("onnx", ("edgeforge.json",), JSON, INSPECT),
    "manifest of Core ML": Kind("coreml", ("edgeforge.json",), JSON, INSPECT),
    "manifest of ExecuTorch": Kind("executorch", ("edgeforge.json",), JSON, INSPECT),
    "ONNX graph": Kind("onnx", ("model.onnx", "verify.onnx"), ONNX, INSPECT, True),
    "Core ML model": Kind("coreml", (MLMODEL,), MIL, INSPECT, True),
    "Core ML weights": Kind("coreml", (WEIGHT_BIN,), BYTES, INSPECT, True),
    "Core ML package": Kind("coreml", ("model.mlpackage/Manifest.json",), JSON, INSPECT, True),
    "Core ML run": Kind(
        "package",
        ("p.mlpackage/Data/com.apple.CoreML/model.mlmodel",),
        MIL,
        command("coreml-run", "@/p.mlpackage", "--inputs", "@/in.npz", "--json"),
    ),
    "inputs of coreml-run": Kind(
        "package",
        ("in.npz",),
        BYTES,
        command("coreml-run", "@/p.mlpackage", "--inputs", "@/in.npz", "--json"),
    ),
    ".pte": Kind("executorch", ("model.pte",), BYTES, INSPECT, True),
    ".pte and .ptd": Kind("external", ("model.ptd", "model.pte"), BYTES, INSPECT, True),
    "weight_names.json": Kind("names", ("weight_names.json",), JSON, called(_weight_names)),
    "recipe": Kind("recipe", ("recipe.yaml",), YAML_TEXT, called(_recipe)),
    "config.json": Kind("checkpoint", ("config.json",), JSON, called(_checkpoint)),
    "generation_config.json": Kind(
        "checkpoint", ("generation_config.json",), JSON, called(_checkpoint)
    ),
    "safetensors": Kind("checkpoint", ("model.safetensors",), BYTES, called(_checkpoint)),
    "index": Kind("shards", ("model.safetensors.index.json",), JSON, called(_checkpoint)),
    "GGUF": Kind("gguf", ("model.gguf",), GGUF, called(_gguf)),
    "pickle": Kind("pickle", ("pytorch_model.bin",), BYTES, called(_checkpoint)),
    "calibration text": Kind("text", ("text.txt",), BYTES, called(_calibration)),
    "store": Kind("store", ("store.json",), JSON, called(_store)),
}


def make_seeds(folder: Path) -> None:
    """Makes the sound files, in a process of its own: this one must stay free of threads."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\nimport fuzz_readers\n"
    code += f"fuzz_readers.write_seeds(__import__('pathlib').Path({str(folder)!r}))"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "EDGEFORGE_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
    )


def write_seeds(folder: Path) -> None:
    """Writes the sound files of every kind."""
    import numpy as np
    import torch

    from edgeforge import api
    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.model.model import CALIBRATION_TEXT
    from edgeforge.synth.synthesise import synthesise
    from exporters.coreml.function import FunctionBuilder

    sound = synthesise("tiny-llama", folder / "checkpoint")
    synthesise("tiny-llama", folder / "shards", shards=2)
    targets = ["onnx", "coreml", "executorch"]
    for path in api.export(sound, folder / "artifacts", targets=targets):
        path.rename(folder / path.name)
    api.export(sound, folder / "external", targets=["executorch"], weights="external")
    pickle = shutil.copytree(sound, folder / "pickle")
    checkpoint = Checkpoint.open(pickle)
    tensors = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensors}
    tensors = {
        n: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for n, t in tensors.items()
    }
    (pickle / "model.safetensors").unlink()
    torch.save(tensors, pickle / "pytorch_model.bin")
    _write_gguf(folder / "gguf")
    for name in ("recipe", "text", "names", "package"):
        (folder / name).mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(RECIPE)
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")[:20_000]
    (folder / "text" / "text.txt").write_text(text, encoding="utf-8")
    shutil.copy(folder / "executorch" / "model.pte", folder / "names" / "model.pte")
    noted = {
        "version": 1,
        "bytes": {"w": {"codes": [{"offset": 64, "nbytes": 64, "layout": "signed of 4 bits"}]}},
        "rows": {"w": 8},
        "digests": {"w": "0" * 32},
    }
    (folder / "names" / "weight_names.json").write_text(json.dumps(noted))
    (stored,) = (folder / "cache" / "stores").iterdir()
    shutil.copytree(stored, folder / "store")
    builder = FunctionBuilder("main", "CoreML8")
    x = builder.input("x", "fp16", (2, 8))
    y = builder.call(
        "softmax", "y", "fp16", (2, 8), x=builder.call("relu", "r", "fp16", (2, 8), x=x)
    )
    builder.output(y)
    _write_package(folder / "package" / "p.mlpackage", builder)
    np.savez(folder / "package" / "in.npz", x=np.ones((2, 8), np.float16))


def _write_gguf(folder: Path) -> None:
    """Writes a GGUF file of a model of one layer with a byte-level vocabulary."""
    import numpy as np
    from gguf import GGUFWriter, quants
    from gguf.constants import GGMLQuantizationType

    folder.mkdir()
    writer = GGUFWriter(folder / "model.gguf", "llama")
    for add, number in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 1),
    ):
        add(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", *"abcdef", "ab", "abc"])
    writer.add_token_types([3, 3, *[1] * 8])
    writer.add_token_merges(["a b", "ab c"])
    draw = np.random.default_rng(0)
    shapes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), 32)
    matrices = {"token_embd.weight": 32} | {f"blk.0.{n}.weight": r for n, r in shapes.items()}
    for name, rows in matrices.items():
        values = draw.normal(0, 0.2, (rows, 32)).astype(np.float32)
        kind = GGMLQuantizationType.Q4_0 if "ffn" in name else GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_package(folder: Path, builder: object) -> None:
    """Writes a package of one function and no weights."""
    from exporters.coreml.schema import messages

    model = messages()["Model"](specificationVersion=9)
    model.mlProgram.version = 1
    model.mlProgram.functions[builder.name].CopyFrom(builder.message())
    inner = folder / "Data" / "com.apple.CoreML"
    inner.mkdir(parents=True)
    (inner / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    contents = {
        "itemInfoEntries": {"a": {"path": "com.apple.CoreML/model.mlmodel"}},
        "rootModelIdentifier": "a",
    }
    (folder / "Manifest.json").write_text(json.dumps(contents))


@dataclass(frozen=True)
class Outcome:
    """What became of one file: a column of the table, the exit code, and the last line printed."""

    column: str
    code: int
    words: str


def spoil(kind: Kind, copy: Path, draw: random.Random) -> str:
    """Spoils one file of a copy and returns how.

    A file that is spoiled twice over could not be parsed, so each has one fault.
    """
    file = copy / draw.choice(kind.files)
    if draw.randrange(SPECIAL) == 0:
        special_file(file, draw)
        return f"{file.name}: special file"
    mutation = draw.choice(kind.mutations)
    file.write_bytes(mutation(file.read_bytes(), draw))
    if kind.sealed:
        _seal(copy, file)
    return f"{file.name}: {mutation.__name__}"


def _seal(artifact: Path, file: Path) -> None:
    manifest = json.loads((artifact / "edgeforge.json").read_text(encoding="utf-8"))
    data = file.read_bytes()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][file.relative_to(artifact).as_posix()] = record
    (artifact / "edgeforge.json").write_text(json.dumps(manifest), encoding="utf-8")


def read_within_bounds(read: Callable[[Path], None], folder: Path) -> Outcome:
    """Reads a folder in a process of its own, within bounds of time and memory."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        _child(read, folder, tell)
    os.close(tell)
    deadline, output = time.monotonic() + PATIENCE, io.BytesIO()
    os.set_blocking(told, False)
    status = None
    while status is None and time.monotonic() < deadline:
        _drain(told, output)
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        if status is None:
            time.sleep(0.002)
    late = status is None
    if late:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    _drain(told, output)
    os.close(told)
    return _outcome(late, status, output.getvalue().decode(errors="replace"))


def _drain(told: int, output: io.BytesIO) -> None:
    try:
        while block := os.read(told, 1 << 16):
            output.write(block)
    except BlockingIOError:
        return


def _child(read: Callable[[Path], None], folder: Path, tell: int) -> None:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(tell, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.setpgid(0, 0)
        try:
            read(folder)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _outcome(late: bool, status: int, words: str) -> Outcome:
    lines = words.strip().splitlines() or [""]
    code = os.waitstatus_to_exitcode(status)
    if late or -code in (signal.SIGXCPU, signal.SIGKILL):
        return Outcome("too long", code, lines[-1])
    if "MemoryError" in words or "bad_alloc" in words or "Cannot allocate memory" in words:
        return Outcome("too much memory", code, lines[-1])
    if code < 0:
        return Outcome("crash", code, lines[-1])
    if "Traceback (most recent call last)" in words or code == 70:
        return Outcome("traceback", code, lines[-1])
    if code == 0:
        return Outcome("accepted", code, "")
    sentence = len(lines) == 1 and lines[0].startswith("edgeforge: ")
    return Outcome("sentence" if sentence else "traceback", code, lines[-1])


def fuzz(
    seeds: Path, kinds: Iterable[str], count: int, seed: int
) -> Iterator[tuple[str, int, str, Outcome]]:
    """Spoils ``count`` files of each kind; yields the kind, the number, how, and what became."""
    for name in kinds:
        kind = KINDS[name]
        for number in range(count):
            draw = random.Random(f"{seed} {name} {number}")
            with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
                copy = Path(place) / "copy"
                shutil.copytree(seeds / kind.seed, copy)
                how = spoil(kind, copy, draw)
                yield name, number, how, read_within_bounds(kind.read, copy)


@contextmanager
def seeds_in(folder: Path | None) -> Iterator[Path]:
    """The sound files: in a folder, where they stay, or in one that goes at the end."""
    if folder is not None:
        if not folder.exists():
            make_seeds(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as place:
        make_seeds(Path(place))
        yield Path(place)


def import_readers() -> None:
    """Imports what reading needs, so that no process has to do it again."""
    import quant.plans.recipes
    import quant.quantizers.registry  # noqa: F401


def main() -> None:
    """Reads the arguments, spoils, counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=2000, help="in all, of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=Path, help="folder for the sound files, kept for later")
    parser.add_argument("--faults", type=int, default=40, help="how many faults to list")
    options = parser.parse_args()
    count = -(-options.mutations // len(options.kinds))
    found: dict[str, Counter[str]] = {name: Counter() for name in options.kinds}
    codes: dict[str, Counter[int]] = {name: Counter() for name in options.kinds}
    faults: Counter[str] = Counter()
    with seeds_in(options.seeds) as seeds:
        import_readers()
        os.environ["EDGEFORGE_CACHE"] = str(seeds / "cache")
        for name, number, how, outcome in fuzz(seeds, options.kinds, count, options.seed):
            found[name][outcome.column] += 1
            if outcome.column == "sentence":
                codes[name][outcome.code] += 1
            elif outcome.column != "accepted":
                faults[f"{name} {number} ({how}): {outcome.column}: {outcome.words[:160]}"] += 1
    print(table(found, codes))
    for fault in list(faults)[: options.faults]:
        print(fault)


def table(found: dict[str, Counter[str]], codes: dict[str, Counter[int]]) -> str:
    """One row a kind: how many were tried, and what became of them."""
    rows = [["kind", "tried", *COLUMNS, "exit codes"]]
    total: Counter[str] = Counter()
    for name, counts in found.items():
        total += counts
        listed = ", ".join(f"{code}: {times}" for code, times in sorted(codes[name].items()))
        rows.append([name, str(counts.total()), *(str(counts[c]) for c in COLUMNS), listed])
    rows.append(["all", str(total.total()), *(str(total[column]) for column in COLUMNS), ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    main()
