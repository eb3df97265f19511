"""`Adapter`: an opened adapter in peft's format, its tensors named as the model's modules.

Only ``adapter_config.json`` and ``adapter_model.safetensors`` are read, and no code is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.checkpoint.adapter_config import LoraConfig, read_lora_config
from edgeforge.checkpoint.adapters import ADAPTER_CONFIG
from edgeforge.checkpoint.checkpoint import READ_AS, Checkpoint
from edgeforge.checkpoint.digest import digest_files
from edgeforge.checkpoint.links import refuse_dangling
from edgeforge.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = "adapter_model.bin"
_PREFIX: Final = "base_model.model."

# The ends of the names of an adapter's tensors, and what each is.
_PARTS: Final = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Values that are read at a time to look for NaN.
_LOOKED_AT: Final = 1 << 22


@dataclass(frozen=True)
class Factors:
    """The tensors by which an adapter changes one module's matrix; their names in its file.

    Attributes:
        down: ``A``: ``float[rank, in]``; of an embedding ``float[rank, vocabulary]``.
        up: ``B``: ``float[out, rank]``; of an embedding ``float[width, rank]``.
        magnitude: DoRA's length of each row, ``float[out]``; None without DoRA.
        embedding: whether the matrix is an embedding's, whose rows are the columns of ``B A``.
        rank: the rank.
        scale: the factor on the product ``B A``.
    """

    down: str
    up: str
    magnitude: str | None
    embedding: bool
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Attributes:
        name: the name of its folder.
        source: the folder that the user gave.
        weight: the factor on what it adds.
        config: its configuration.
        tensors: reads its tensors, and watches its files.
        factors: what changes a module's matrix, by the module's name in transformers.
        replaced: the tensors that take the place of the model's, by the model's name, each with
            its name in the file.
        sha256: digest of its two files, as ``sha256sum NAMES... | sha256sum`` prints it.
    """

    name: str
    source: str
    weight: float
    config: LoraConfig
    tensors: Checkpoint
    factors: dict[str, Factors]
    replaced: dict[str, str]
    sha256: str

    @property
    def place(self) -> Path:
        """The absolute path by which it is found again."""
        return self.tensors.path.resolve()

    @property
    def files(self) -> tuple[Path, Path]:
        """The files that are read."""
        return self.tensors.path / ADAPTER_CONFIG, self.tensors.path / ADAPTER_WEIGHTS

    def described(self) -> str:
        """Returns its name for users, and its weight where that is not 1."""
        return f"the adapter {self.name}" + ("" if self.weight == 1 else f" times {self.weight:g}")


def open_adapters(given: Iterable[str]) -> tuple[Adapter, ...]:
    """Opens adapters that are given as ``DIR`` or ``DIR@weight``.

    Raises:
        UsageError: a weight is no number, or an adapter is given twice.
        CheckpointError: an adapter is missing, damaged, or computes what EdgeForge does not.
    """
    found: list[Adapter] = []
    for text in given:
        folder, weight = _parsed(text)
        adapter = open_adapter(folder, weight)
        if any(adapter.place == other.place for other in found):
            raise UsageError(f"--adapter {folder} is given twice: give it once, with one weight")
        found.append(adapter)
    return tuple(found)


def open_adapter(source: str, weight: float = 1.0) -> Adapter:
    """Opens an adapter and checks all of it that does not depend on the model.

    Args:
        source: a folder.
        weight: the factor on what it adds.

    Raises:
        CheckpointError: it is missing, damaged, pickled, or computes what EdgeForge does not.
    """
    folder = Path(source).expanduser()
    refuse_dangling(folder)
    if not source or not folder.is_dir():
        raise CheckpointError(f"the adapter {source!r} is not a folder")
    file = folder / ADAPTER_WEIGHTS
    if not file.exists() and (folder / _PICKLED).exists():
        raise CheckpointError(
            f"{folder / _PICKLED} is pickled, and EdgeForge reads adapters from {ADAPTER_WEIGHTS} "
            f"alone: convert it, safetensors.torch.save_file(torch.load({_PICKLED!r}, "
            f"weights_only=True), {ADAPTER_WEIGHTS!r})"
        )
    if not (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder} is not an adapter of peft: it has no {ADAPTER_CONFIG}")
    tensors = Checkpoint.of_tensors(folder, file, source)
    config = read_lora_config(folder)
    factors, replaced = _sorted_out(file, tensors, config)
    _refuse_nan(file, tensors)
    digest = adapter_digest(folder)
    tensors.require_unchanged()
    name = folder.resolve().name
    return Adapter(name, source, weight, config, tensors, factors, replaced, digest)


def adapter_digest(folder: Path) -> str:
    """Returns the digest of an adapter's two files; see `Adapter.sha256`.

    Raises:
        CheckpointError: one cannot be read.
    """
    paths = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    return digest_files([(path.name, path) for path in paths]).sha256


def _parsed(text: str) -> tuple[str, float]:
    """Returns the folder and the weight of ``DIR`` or ``DIR@weight``.

    >>> _parsed("tuned@0.5"), _parsed("tuned")
    (('tuned', 0.5), ('tuned', 1.0))
    """
    folder, at, number = text.rpartition("@")
    if not at or Path(text).expanduser().is_dir():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not weight:
        raise UsageError(
            f"--adapter {text}: the weight {number!r} is not a number other than 0: write "
            f"{folder}@0.5, or {folder} for 1"
        )
    return folder, weight


def _sorted_out(
    file: Path, tensors: Checkpoint, config: LoraConfig
) -> tuple[dict[str, Factors], dict[str, str]]:
    """Returns an adapter's tensors by module, and those that replace the model's."""
    parts: dict[str, dict[str, str]] = {}
    replaced = {}
    for stored, entry in tensors.tensors.items():
        if entry.dtype not in READ_AS:
            raise CheckpointError(
                f"{file}: {stored[:200]} is {entry.dtype}; adapters are read in "
                f"{', '.join(READ_AS)}"
            )
        if not stored.startswith(_PREFIX):
            raise CheckpointError(
                f"{file} holds {stored[:200]!r}; tensors of peft's adapters begin with {_PREFIX}"
            )
        name = stored.removeprefix(_PREFIX)
        end = next((end for end in _PARTS if name.endswith(end)), None)
        if end is not None:
            parts.setdefault(name.removesuffix(end), {})[_PARTS[end]] = stored
            continue
        if ".lora_" in name or not name.endswith((".weight", ".bias")):
            raise CheckpointError(
                f"{file} holds {stored[:200]!r}, which is no part of LoRA that EdgeForge computes"
            )
        replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = stored
    if not parts and not replaced:
        raise CheckpointError(f"{file} holds no tensors: there is nothing to merge")
    factors = {
        module: _factors(file, tensors, config, module, held) for module, held in parts.items()
    }
    for target in config.target_modules:
        if not any(f".{module}".endswith(f".{target}") for module in factors):
            raise CheckpointError(
                f"{file} holds nothing for {target[:200]!r}, which target_modules in "
                f"{ADAPTER_CONFIG} names: the adapter is not whole"
            )
    return factors, replaced


def _factors(
    file: Path, tensors: Checkpoint, config: LoraConfig, module: str, held: dict[str, str]
) -> Factors:
    embedding = any(part.startswith("embedding") for part in held)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    lacking = [part for part in names if part not in held]
    if lacking:
        raise CheckpointError(
            f"{file} lacks lora_{lacking[0]} of {module[:200]}: the adapter is not whole"
        )
    magnitude = held.get("magnitude")
    if config.dora and embedding:
        raise CheckpointError(
            f"{file} changes the embedding {module[:200]} by DoRA, which EdgeForge does not compute"
        )
    if config.dora and magnitude is None:
        raise CheckpointError(
            f"{file} lacks lora_magnitude_vector of {module[:200]}, though {ADAPTER_CONFIG} says "
            f"DoRA (use_dora): the adapter is not whole"
        )
    if magnitude is not None and not config.dora:
        raise CheckpointError(
            f"{file} holds lora_magnitude_vector of {module[:200]}, though {ADAPTER_CONFIG} does "
            f"not say DoRA (use_dora): the two do not belong together"
        )
    down, up = (tensors.tensors[held[part]].shape for part in names)
    rank = config.rank_of(module)
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        raise CheckpointError(
            f"{file}: lora_{names[0]} and lora_{names[1]} of {module[:200]} have shapes "
            f"{list(down)} and {list(up)}, and {ADAPTER_CONFIG} says rank {rank}: they must be "
            f"[{rank}, in] and [out, {rank}]"
        )
    scale = config.scale_of(module)
    return Factors(held[names[0]], held[names[1]], magnitude, embedding, rank, scale)


def _refuse_nan(file: Path, tensors: Checkpoint) -> None:
    """Refuses values that are not finite: an adapter is small, so all of it is looked at."""
    import torch

    for name, entry in tensors.tensors.items():
        if not entry.shape or not math.prod(entry.shape):
            raise CheckpointError(f"{file}: {name[:200]} has shape {list(entry.shape)}")
        step = max(1, _LOOKED_AT // max(1, math.prod(entry.shape[1:])))
        for start in range(0, entry.shape[0], step):
            rows = read_floats(tensors, name, start, min(start + step, entry.shape[0]))
            if not torch.isfinite(rows).all():
                raise CheckpointError(
                    f"{file}: {name[:200]} holds a value that is not finite: the adapter is damaged"
                )


def read_floats(tensors: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
    """Returns rows of a tensor as ``float32``."""
    import torch

    rows = torch.from_numpy(tensors.read_rows(name, start, stop))
    if tensors.tensors[name].dtype == "bfloat16":
        rows = rows.view(torch.bfloat16)
    return rows.float()
