"""Random weights in every kind of format, and the store that is made of them."""

import hashlib
from pathlib import Path

import torch

from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore

FORMATS = {
    "embed": ((40, 64), "int4-g32"),
    "norm": ((64,), "fp32"),
    "asym": ((33, 64), "int4-g32-asym"),
    "eight": ((17, 64), "int8-pc"),
    "two": ((33, 64), "int2-g16-asym"),
    "three": ((17, 64), "int3-g32"),
    "half": ((9, 64), "fp16"),
    "brain": ((9, 64), "bf16"),
}
SHAPES = {name: shape for name, (shape, _) in FORMATS.items()}
PLAN = QuantPlan(
    "mine",
    {
        name: Assignment(parse_format(format), "rtn" if format.startswith("int") else "cast")
        for name, (_, format) in FORMATS.items()
    },
)
KEY = "a" * 40


class Source:
    """Random weights held in memory."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
        }

    def shapes(self):
        return SHAPES

    def pieces(self, name):
        return [(name, 1 if len(SHAPES[name]) == 1 else SHAPES[name][0])]

    def read_rows(self, name, start, stop):
        return self.weights[name].reshape(-1, self.weights[name].shape[-1])[start:stop]


def make(cache: Path, source: Source | None = None, key: str = KEY, **options) -> WeightStore:
    with new_store(cache, key, PLAN, SHAPES) as writer:
        fill_store(source or Source(), PLAN, writer, **options)
    return WeightStore(cache / key)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
