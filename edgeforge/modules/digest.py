"""The digest of named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest_of_tensors(tensors: Mapping[str, object]) -> str:
    """SHA-256 of names, shapes and values; what is no tensor is left out."""
    found = hashlib.sha256()
    for name, given in tensors.items():
        if isinstance(given, torch.Tensor):
            tensor = given.detach().contiguous()
            found.update(f"{name} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
