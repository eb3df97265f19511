"""Reads folders of sentence-transformers: one transformer, pooling, and normalization or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.modules.factory import Made
from exporters.vendor_output import quiet
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json

MODULES: Final = "modules.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_LARGEST: Final = 1 << 20
_KINDS: Final = ("Transformer", "Pooling", "Normalize")
_MODES: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_BATCH: Final = 64
_HIDDEN: Final = -1e9  # below any activation, where a maximum passes a token over


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of sentence-transformers.

    Attributes:
        folder: the folder.
        transformer: the folder of the transformer's configuration and weights.
        pooling: ``mean``, ``cls``, ``max`` or ``lasttoken``.
        normalized: whether embeddings have length 1.
        tokens: the most tokens of a text that it takes; None for the transformer's own limit.
    """

    folder: Path
    transformer: Path
    pooling: str
    normalized: bool
    tokens: int | None

    @property
    def sidecars(self) -> dict[str, Path]:
        """The tokenizer's files by their names."""
        places = (self.transformer, self.folder)
        found: dict[str, Path] = {}
        for name in TOKENIZER_FILES:
            for place in places:
                if (place / name).is_file():
                    found.setdefault(name, place / name)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What the manifest says of the folder."""
        ending = " and scaled to length 1" if self.normalized else ""
        limit = "" if self.tokens is None else f"; texts of more than {self.tokens} tokens are cut"
        return (
            f"sentence_embedding is the {self.pooling} of the tokens whose attention_mask is "
            f"1{ending}{limit}",
        )


def is_sentence_folder(source: Path) -> bool:
    """Whether a folder is one of sentence-transformers."""
    return (source / MODULES).is_file()


def read_folder(folder: Path) -> SentenceFolder:
    """Reads ``modules.json`` and what it names.

    Raises:
        CheckpointError: a file is missing or damaged, or the model has other parts than one
            transformer, one pooling and one normalization.
    """
    rows = _json(folder / MODULES)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise CheckpointError(f"{folder / MODULES} is no list of parts")
    kinds = [str(row.get("type", "")).rpartition(".")[2] for row in rows]
    strangers = [kind for kind in kinds if kind not in _KINDS]
    if strangers or tuple(kinds) not in (_KINDS, _KINDS[:2]):
        found = strangers[0] if strangers else ", ".join(kinds) or "nothing"
        raise CheckpointError(
            f"{folder} is a model of {found}; EdgeForge exports folders of one Transformer, one "
            f"Pooling and at most one Normalize"
        )
    places = [_inside(folder, row) for row in rows]
    config = _json(places[1] / "config.json")
    limits = places[0] / "sentence_bert_config.json"
    limit = _json(limits).get("max_seq_length") if limits.is_file() else None
    return SentenceFolder(
        folder=folder,
        transformer=places[0],
        pooling=_pooling(places[1], config),
        normalized=len(rows) == 3,
        tokens=limit if type(limit) is int and limit > 1 else None,
    )


def _inside(folder: Path, row: Mapping[str, object]) -> Path:
    path = row.get("path", "")
    if not isinstance(path, str) or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / MODULES} names {path!r}, which is not in its folder")
    return folder / path


def _pooling(folder: Path, config: Mapping[str, Any]) -> str:
    asked = [mode for name, mode in _MODES.items() if config.get(name)]
    if not asked and isinstance(config.get("pooling_mode"), str):
        asked = [config["pooling_mode"]]
    others = [n for n, v in config.items() if n.startswith("pooling_mode_") and v is True]
    if len(asked) != 1 or asked[0] not in _MODES.values() or len(others) > 1:
        raise CheckpointError(
            f"{folder / 'config.json'} asks for {', '.join(others or asked) or 'no pooling'}; "
            f"EdgeForge exports one of {', '.join(_MODES.values())}"
        )
    return asked[0]


def _json(path: Path) -> Any:
    try:
        return parse_json(read_input(path, _LARGEST))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise CheckpointError(f"{path} cannot be read: it {error}") from None


class SentenceEncoder(nn.Module):
    """A transformer with pooling and normalization in its graph.

    Args:
        transformer: gives ``last_hidden_state float32[batch, tokens, width]``.
        pooling: how a text's tokens become one vector.
        normalized: whether that vector is scaled to length 1.
    """

    def __init__(self, transformer: nn.Module, pooling: str, normalized: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self._pooling, self._normalized = pooling, normalized

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Embeds texts.

        Args:
            input_ids: ``int64[batch, tokens]``.
            attention_mask: ``int64[batch, tokens]``, 1 for a text's tokens and 0 for padding.
        """
        outputs = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        pooled = self._pool(outputs.last_hidden_state, attention_mask)
        if self._normalized:
            pooled = nn.functional.normalize(pooled, p=2.0, dim=1)
        return {"sentence_embedding": pooled}

    def _pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return states[:, 0]
        seen = mask.to(states.dtype).unsqueeze(-1)
        if self._pooling == "max":
            return torch.where(seen > 0, states, torch.full_like(states, _HIDDEN)).amax(1)
        if self._pooling == "lasttoken":
            # Padding may be on either side: the last token is where the count of tokens ends.
            count = mask.cumsum(1)
            last = (count == count[:, -1:]) & (mask > 0)
            return (states * last.to(states.dtype).unsqueeze(-1)).sum(1)
        return (states * seen).sum(1) / torch.clamp(seen.sum(1), min=1e-9)


def load(found: SentenceFolder) -> Made:
    """Loads the transformer by transformers, from safetensors, without running any code of it.

    Raises:
        CheckpointError: transformers cannot read the folder.
        UsageError: transformers is not installed.
    """
    try:
        with quiet("transformers", str(found.folder), "transformers"):
            from transformers import AutoModel

            transformer = AutoModel.from_pretrained(
                str(found.transformer),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
    except Exception as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise UsageError(str(error)) from error
        raise CheckpointError(str(error)) from error
    if getattr(transformer.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{found.folder} holds an encoder with a decoder, not an encoder")
    module = SentenceEncoder(transformer, found.pooling, found.normalized)
    config = transformer.config
    most = found.tokens or int(getattr(config, "max_position_embeddings", 0) or 512)
    batch = torch.export.Dim("batch", min=1, max=_BATCH)
    tokens = torch.export.Dim("tokens", min=2, max=most)
    size = min(16, most - 1)
    ids = torch.randint(
        int(config.vocab_size), (2, size), generator=torch.Generator().manual_seed(0)
    )
    mask = torch.ones(2, size, dtype=torch.int64)
    mask[1, size // 2 :] = 0
    axes = {0: batch, 1: tokens}
    return Made(
        module,
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": axes, "attention_mask": axes},
    )
