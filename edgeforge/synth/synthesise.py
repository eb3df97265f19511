"""``edgeforge synth``: writes a Hugging Face folder of random weights in a released model's shape.

The size, time and memory of an export depend on the weights' shapes and not on their values, so
such a folder can replace a released checkpoint wherever only those are measured. The weights are
streamed to disk: memory stays below 100 MB whatever the model's size.

The elements of a matrix are normally distributed with standard deviation ``1 / sqrt(columns)``
(0.022 at 2048 columns, as in released models). One column in 128 has four times that deviation, so
that a quantizer meets outliers. The elements of a vector are normally distributed with deviation
0.1, a norm's around 1 (or 0, where one is added to them) and a bias's around 0. Each value is read
from a table of 65536 evenly spaced quantiles of the normal distribution by 16 random bits, which
cuts the tails at 4.3 deviations and is seven times faster than drawing values one by one.
"""

import hashlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeforge.checkpoint.world_vocabulary import byte_characters
from edgeforge.errors import UsageError
from edgeforge.output_folder.atomic import atomic_folder
from edgeforge.output_folder.contents import SYNTH_RECORD
from edgeforge.synth.preset import TINY_BOS, TINY_EOS, TINY_PAD, TINY_VOCAB, Preset
from edgeforge.synth.presets import PRESETS
from quant.suggestion import nearest

__all__ = ["PRESETS", "Preset", "synthesise", "write_byte_tokenizer"]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHARD_BYTES = 5 * 10**9
THREADS = 2
CHUNK_WEIGHTS = 1 << 18
OUTLIER_EVERY, OUTLIER_FACTOR = 128, 4.0
LEAST_COLUMNS = 16  # a convolution's few have no outliers
VECTOR_DEVIATION = 0.1
WORDS_PER_BLOCK = 16  # one step of Philox's counter gives 256 bits: 16 draws of 16 bits

Table = npt.NDArray[Any]
Progress = Callable[[int, int], None]


def synthesise(
    preset: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int | None = None,
    config_style: str = "hub",
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Write a checkpoint of random weights in the shape of ``preset``; return its folder.

    Each element depends only on the seed, its tensor's name and its place in the tensor, so the
    weights are the same whatever the number of shards or threads. The folder appears under its
    final name only when it is complete.

    Args:
        preset: a key of ``PRESETS``.
        out: the folder to make.
        seed: any integer; the same seed gives the same bytes.
        dtype: the stored dtype: ``bfloat16``, ``float16`` or ``float32``.
        shards: number of safetensors files; None for as few as possible of at most 5 GB each.
        config_style: ``hub`` (as released) or ``rope_parameters`` (as transformers 5 writes it).
        progress: called with (bytes written, bytes in all) about every half megabyte.
        force: whether to replace ``out`` if it is a synthesised checkpoint already.

    Raises:
        UsageError: the preset, dtype or style is unknown, the model cannot be cut into that many
            shards, or ``out`` cannot be used or exists and ``force`` is off.
        DiskFullError: the disk is too small (checked before any work), or fills up meanwhile.
    """
    shape = _find(preset)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    try:
        config = shape.config_json(dtype, config_style)
    except ValueError as error:
        raise UsageError(f"{preset}: {error}") from error
    files = _plan_files(preset, shape, dtype, shards)
    needed = sum(file.nbytes for file in files)
    with atomic_folder(out, force, needed_bytes=needed) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", dict(shape.generation_config))
        if shape.byte_tokenizer:
            write_byte_tokenizer(folder)
        _write_weights(folder, files, seed, dtype, progress)
        _write_json(folder / SYNTH_RECORD, _record(preset, seed, folder))
    return out


def _record(preset: str, seed: int, folder: Path) -> dict[str, Any]:
    """What says that a folder was synthesised, of which files: only such a one is replaced."""
    sizes = {path.name: {"size": path.stat().st_size} for path in sorted(folder.iterdir())}
    return {"schema_version": 1, "preset": preset, "seed": seed, "files": sizes}


def write_byte_tokenizer(folder: Path, entries: int = TINY_VOCAB) -> None:
    """Write a tokenizer with a token per byte (its id is the byte), and begin, end and pad tokens.

    It puts the begin token in front of prompts. The other ids below ``entries`` are unused special
    tokens, so that every token a random model produces can be decoded.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    names = {TINY_BOS: "<|begin|>", TINY_EOS: "<|end|>", TINY_PAD: "<|pad|>"}
    specials = [names.get(i, f"<|unused_{i}|>") for i in range(256, entries)]
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A",
        pair=f"{specials[0]} $A {specials[0]} $B",
        special_tokens=[(specials[0], TINY_BOS)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=False))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **tokens,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,  # some families' tokenizers would add one of their own
        },
    )


def _find(preset: str) -> Preset:
    if preset in PRESETS:
        return PRESETS[preset]
    near = nearest(preset.lower(), PRESETS)
    hint = "" if near is None else f"did you mean {near}? "
    raise UsageError(f"there is no preset {preset!r}: {hint}known are {', '.join(PRESETS)}")


@dataclass(frozen=True)
class _File:
    """One safetensors file: its name, its tensors in the order of their bytes, vectors' centres."""

    name: str
    tensors: list[tuple[str, tuple[int, ...]]]
    nbytes: int
    centres: dict[str, float]


def _plan_files(preset: str, shape: Preset, dtype: str, shards: int | None) -> list[_File]:
    tensors = shape.tensors()
    itemsize = _itemsize(dtype)
    if shards is not None and not 1 <= shards <= len(tensors):
        raise UsageError(
            f"{preset} cannot be cut into {shards} shards: it has {len(tensors)} tensors, "
            f"so give a number from 1 to {len(tensors)}"
        )
    groups = _split(tensors, itemsize, shards)
    names = ["model.safetensors"]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    centres = shape.centres()
    return [
        _File(name, sorted(group), sum(math.prod(shape) for _, shape in group) * itemsize, centres)
        for name, group in zip(names, groups, strict=True)
    ]


def _split(
    tensors: list[tuple[str, tuple[int, ...]]], itemsize: int, shards: int | None
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the tensors, in order, into files of at most 5 GB, or ``shards`` of similar size."""
    sizes = [math.prod(shape) * itemsize for _, shape in tensors]
    share = sum(sizes) / shards if shards else float(SHARD_BYTES)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if shards is None:
            full = filled + size > share
        else:
            # Each of the remaining files must get at least one tensor, however large the first are.
            needed = shards - len(groups)
            full = needed > 0 and (filled + size / 2 > share or len(tensors) - i <= needed)
        if full and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return groups


def _write_weights(
    folder: Path, files: list[_File], seed: int, dtype: str, progress: Progress | None
) -> None:
    total = sum(file.nbytes for file in files)
    written = 0
    for file in files:
        before = written

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        _write_file(folder / file.name, file, seed, dtype, report)
        written += file.nbytes
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name, _ in file.tensors}
        parameters = total // _itemsize(dtype)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / "model.safetensors.index.json", index)


def _write_file(
    path: Path, file: _File, seed: int, dtype: str, report: Callable[[int], None]
) -> None:
    header, begins = _header(file, dtype)
    itemsize = _itemsize(dtype)
    chunks = _chunks(file, begins)
    lock = threading.Lock()
    stop = threading.Event()
    done = 0
    with open(path, "wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + file.nbytes)
        stream.flush()

        def work() -> None:
            nonlocal done
            while not stop.is_set():
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                values = _draw(chunk, seed, dtype)
                _write_at(stream.fileno(), values, len(header) + chunk.begin * itemsize)
                with lock:
                    done += values.nbytes
                    report(done)

        with ThreadPoolExecutor(THREADS) as pool:
            workers = [pool.submit(work) for _ in range(THREADS)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                stop.set()


def _write_at(descriptor: int, values: Table, offset: int) -> None:
    rest = values.data.cast("B")
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def _header(file: _File, dtype: str) -> tuple[bytes, list[int]]:
    """Return the file's header (length and JSON), and each tensor's begin, counted in elements."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    itemsize = _itemsize(dtype)
    begins, at = [], 0
    for name, shape in file.tensors:
        end = at + math.prod(shape)
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [at * itemsize, end * itemsize],
        }
        begins.append(at)
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, begins


@dataclass(frozen=True)
class _Chunk:
    """Rows of a tensor, from row ``first`` on; ``begin`` is their place in the file in elements.

    ``centre`` is that of a vector's elements, None for a matrix.
    """

    name: str
    centre: float | None
    first: int
    rows: int
    columns: int
    begin: int


def _chunks(file: _File, begins: list[int]) -> Iterator[_Chunk]:
    for (name, shape), begin in zip(file.tensors, begins, strict=True):
        columns = shape[-1]
        rows = math.prod(shape) // columns
        step = max(1, CHUNK_WEIGHTS // columns)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield _Chunk(
                name, file.centres.get(name), first, count, columns, begin + first * columns
            )


def _draw(chunk: _Chunk, seed: int, dtype: str) -> Table:
    """Return the chunk's elements as the stored dtype's bits, ``[rows, columns]``."""
    key = _key(seed, chunk.name)
    start, size = chunk.first * chunk.columns, chunk.rows * chunk.columns
    block, skip = divmod(start, WORDS_PER_BLOCK)
    random = np.random.Philox(key=key, counter=block).random_raw(-(-(skip + size) // 4))
    draws = random.astype("<u8", copy=False).view("<u2")[skip : skip + size]
    draws = draws.reshape(chunk.rows, chunk.columns)
    if chunk.centre is not None:
        return np.take(_quantiles(chunk.centre, VECTOR_DEVIATION, dtype), draws)
    deviation = 1 / math.sqrt(chunk.columns)
    table = _quantiles(0.0, deviation, dtype)
    # Every index is in range. With mode="clip" and an output, NumPy does not check them.
    values = np.take(table, draws, mode="clip", out=np.empty(draws.shape, table.dtype))
    if chunk.columns < LEAST_COLUMNS:
        return values
    outliers = _outlier_columns(key, chunk.columns)
    wide = _quantiles(0.0, deviation * OUTLIER_FACTOR, dtype)
    values[:, outliers] = wide[draws[:, outliers]]
    return values


@lru_cache(maxsize=4096)
def _key(seed: int, name: str) -> int:
    """Return Philox's 128-bit key for one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:16], "little")


@lru_cache(maxsize=4096)
def _outlier_columns(key: int, columns: int) -> npt.NDArray[np.intp]:
    """Return the columns of larger deviation: one in 128, chosen by the tensor's key."""
    # The counter's top word is 1 here and 0 for the weights, so the two streams never overlap.
    random = np.random.Philox(key=key, counter=1 << 192).random_raw(-(-columns // OUTLIER_EVERY))
    return np.unique(random % np.uint64(columns)).astype(np.intp)


@lru_cache(maxsize=64)
def _quantiles(centre: float, deviation: float, dtype: str) -> Table:
    """Return 65536 evenly spaced quantiles of a normal distribution, as the stored dtype's bits."""
    values = (centre + deviation * _standard_quantiles()).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        # Round to nearest, ties to even: the lower 16 bits are dropped.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4")


@lru_cache(maxsize=1)
def _standard_quantiles() -> npt.NDArray[np.float64]:
    count = 1 << 16
    normal = NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / count) for i in range(count // 2, count)]
    return np.array([-value for value in reversed(upper)] + upper)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
