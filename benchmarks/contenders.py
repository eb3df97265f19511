"""What quality tables compare: other tools' quantizers as they are used, and EdgeForge's recipes.

Every contender quantizes the same weights, and the stored values run through the reference
operators, so that only formats, integers and scales differ; no runtime's kernel takes part. Bits
count the stored bytes of all matrices, with scales and zero points of 16 bits each unless the
format has smaller ones. Vectors stay float32 on all sides and are not counted.

What each peer leaves at which bits:

- onnxruntime-genai's model builder (precision int4): groups of 32, and the quantizer of
  onnxruntime that ``algo_config`` names; ``default`` and ``rtn`` are symmetric. It quantizes
  products only: the embedding stays in float and is stored beside the head even where the two are
  tied. For a CPU it writes scales and embedding in float32. That is the row "as it comes". The
  other rows have the option ``shared_embeddings=true``, or the like where the head is not tied:
  every matrix is quantized. Their scales count 16 bits, but for the row "float32 scales".
- onnxruntime's HQQ is no method of the builder; its zero points are numbers of 16 bits.
- llama.cpp: `ggml_quantizers` has the type of each tensor.
- torchao's 8da4w: every matrix; export_llm itself leaves the embedding in float by default.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import ggml_quantizers
import onnxruntime_quantizers
import torch
import torchao_quantizers
from ggml_source import GGML_SOURCE
from judging import filled_store
from measurements import Measurement, OnText, code_digest, made_now, refused_now
from plans import mixed_plan, parameters, recipe_plan, stored_bytes
from yardstick import ROOT, Yardstick

from edgeforge.calibration.text import SELF
from edgeforge.errors import EdgeForgeError
from quant.errors import QuantizationError
from quant.plans.plan import QuantPlan, calibrated_weights

PEER, DATA_FREE, OWN_TEXT = "peer", "data-free", "own text"
MIXED, CALIBRATED = "mixed", "calibrated"
BUDGETS: Final = (4.0, 4.5, 5.0)
# The file types of llama.cpp at whose bytes mixed plans are made too.
MATCHED: Final = ("Q4_K_M",)
AS_IT_COMES: Final = "genai builder default, as it comes"
GROUP: Final = 32  # of the builder
_UNIFORM: Final = (
    *("int4-pc", "int4-g128", "int4-g64", "int4-g32", "int4-g32-signed"),
    *("int4-g64-asym", "int4-g32-asym", "int8", "int8-g32", "int4-g32-signed-gptq"),
)
# Recipes whose plan follows the targets, and the targets: by the title's end.
_FOLLOWING: Final = {
    "int4": {
        "all targets": ("onnx", "coreml", "executorch"),
        "Core ML and ONNX": ("onnx", "coreml"),
        "ONNX": ("onnx",),
    },
    "int4-gptq": {"all targets": ("onnx", "coreml", "executorch"), "ONNX": ("onnx",)},
}
# Code on which the integers and scales of EdgeForge's recipes depend.
_CODE: Final = ("quant", "edgeforge/planning", "edgeforge/calibration")
_JUDGE: Final = ("benchmarks/judging.py",)


@dataclass(frozen=True)
class Values:
    """A quantized model as values.

    Attributes:
        values: the stored values by matrix.
        bits: stored bits of all matrices.
        looked_up: values where tokens are looked up, if they are others.
    """

    values: Mapping[str, torch.Tensor]
    bits: float
    looked_up: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Contender:
    """A way to quantize a model.

    Attributes:
        name: its row's title.
        quantize: returns the values, or the plan of one of EdgeForge's recipes.
        facts: what its figures depend on, beside the model and the texts.
        kind: ``peer``, or what one of EdgeForge's recipes needs: ``data-free`` for nothing,
            ``own text`` for sequences that the model writes, ``mixed`` for a text to choose formats
            on, ``calibrated`` for a text to choose integers. Of the last the plan tells.
    """

    name: str
    quantize: Callable[[Yardstick], Values | QuantPlan]
    facts: Mapping[str, Any]
    kind: str = PEER

    def depends_on(self, yardstick: Yardstick) -> dict[str, Any]:
        """Returns the facts of a measurement on a model."""
        return {
            "contender": {"name": self.name, **self.facts},
            "model": yardstick.digest,
            "texts": {name: text.digest for name, text in yardstick.texts.items()},
            "judge": code_digest(ROOT, _JUDGE),
        }

    def measure(self, yardstick: Yardstick) -> Measurement:
        """Quantizes a model and judges the result on every text."""
        facts, begun = self.depends_on(yardstick), time.perf_counter()
        elements = parameters(yardstick.model, vectors=False)
        try:
            made = self.quantize(yardstick)
        except (ValueError, QuantizationError, EdgeForgeError) as error:
            return refused_now(self.name, self.kind, str(error), facts)
        if isinstance(made, Values):
            seconds = time.perf_counter() - begun
            found = {
                name: OnText(
                    judge.tokens, judge.perplexity, judge.judge(made.values, made.looked_up)
                )
                for name, judge in yardstick.judges.items()
            }
            return made_now(self.name, self.kind, elements, made.bits, seconds, found, facts)
        model, program = yardstick.model, yardstick.program
        planned = time.perf_counter() - begun
        is_own = self.kind == OWN_TEXT
        text = yardstick.own_calibration if is_own else yardstick.calibration
        with filled_store(model, program, made, text) as filled:
            found = {
                name: OnText(
                    judge.tokens, judge.perplexity, judge.judge_store(program, made, filled.store)
                )
                for name, judge in yardstick.judges.items()
            }
        bits = 8.0 * stored_bytes(model, made, vectors=False)
        seconds = planned + filled.seconds
        kind = CALIBRATED if calibrated_weights(made) and not is_own else self.kind
        return made_now(self.name, kind, elements, bits, seconds, found, facts)


def peers(folder: Path) -> Iterator[Contender]:
    """Yields the peers.

    Args:
        folder: where sources of peers are kept.
    """
    builder = {
        "onnxruntime": version("onnxruntime"),
        "code": code_digest(ROOT, ("benchmarks/onnxruntime_quantizers.py",)),
    }
    for name, algorithm, symmetric, written in (
        (AS_IT_COMES, "default", True, Written(32, False)),
        ("genai builder default, float32 scales", "default", True, Written(32)),
        ("genai builder default", "default", True, Written()),
        ("genai builder rtn", "rtn", True, Written()),
        ("genai builder k_quant", "k_quant", False, Written()),
        ("onnxruntime hqq", "hqq", False, Written()),
    ):
        facts = {"algorithm": [algorithm, symmetric, *vars(written).values()], **builder}
        yield Contender(name, _onnxruntime(algorithm, symmetric, written), facts)
    for file_type in ("Q4_0", "Q4_K_M", "Q8_0"):
        facts = {
            "source": GGML_SOURCE.sha256,
            "code": code_digest(ROOT, ("benchmarks/ggml_quantizers.py",)),
        }
        yield Contender(f"llama.cpp {file_type}", _llama_cpp(file_type, folder), facts)
    for title, group, algorithm in (
        ("torchao 8da4w g32", 32, "affine"),
        ("torchao 8da4w g32, HQQ scales", 32, "hqq_scale_only"),
        ("torchao 8da4w g128", 128, "affine"),
    ):
        facts = {
            "torchao": version("torchao"),
            "code": code_digest(ROOT, ("benchmarks/torchao_quantizers.py",)),
        }
        yield Contender(title, _torchao(group, algorithm), facts)


@dataclass(frozen=True)
class Written:
    """What the builder writes around a quantizer's integers.

    Attributes:
        float_bits: bits of a scale, and of a number that stays in float.
        with_embedding: whether the embedding is quantized too.
    """

    float_bits: int = 16
    with_embedding: bool = True


def _onnxruntime(
    algorithm: str, symmetric: bool, written: Written
) -> Callable[[Yardstick], Values]:
    def quantize(yardstick: Yardstick) -> Values:
        weights, embedding = dict(yardstick.weights), yardstick.embedding
        bits = 0.0
        if not written.with_embedding:
            bits += written.float_bits * weights[embedding].numel()
            if not yardstick.model.spec.tied:
                del weights[embedding]
        config = onnxruntime_quantizers.configurations(GROUP, symmetric)[algorithm]
        made = onnxruntime_quantizers.quantized(weights, GROUP, symmetric, config)
        found = _collected(made)
        scales = sum(weight.numel() for weight in weights.values()) / GROUP
        bits += found.bits + (written.float_bits - 16) * scales
        return Values(found.values, bits, None if written.with_embedding else {})

    return quantize


def _llama_cpp(file_type: str, folder: Path) -> Callable[[Yardstick], Values]:
    def quantize(yardstick: Yardstick) -> Values:
        ggml = ggml_quantizers.Ggml(GGML_SOURCE.folder(folder), folder / "ggml.so")
        return _collected(
            ggml_quantizers.quantized(yardstick.model, yardstick.weights, file_type, ggml)
        )

    return quantize


def _torchao(group: int, algorithm: str) -> Callable[[Yardstick], Values]:
    return lambda yardstick: _collected(
        torchao_quantizers.quantized(yardstick.weights, group, algorithm)
    )


def _collected(made: Iterator[tuple[str, torch.Tensor, float]]) -> Values:
    values, total = {}, 0.0
    for name, found, bits in made:
        values[name] = found
        total += bits
    return Values(values, total)


def recipes() -> Iterator[Contender]:
    """Yields EdgeForge's recipes that are no mixed ones."""
    for name, titles in _FOLLOWING.items():
        for title, targets in titles.items():
            yield Contender(
                f"{name}, {title}",
                lambda y, n=name, t=targets: recipe_plan(y.model, n, t),
                {**_own(name), "targets": targets},
                DATA_FREE,
            )
    for title, targets in _FOLLOWING["int4"].items():
        yield Contender(
            f"int4-gptq on its own text, {title}",
            lambda y, t=targets: recipe_plan(y.model, "int4-gptq", t),
            {**_own("int4-gptq"), "targets": targets, "text": SELF},
            OWN_TEXT,
        )
    for name in _UNIFORM:
        yield Contender(name, lambda y, n=name: recipe_plan(y.model, n), _own(name), DATA_FREE)


def mixed_at(recipe: str, bits: float, title: str) -> Contender:
    """Returns a mixed recipe whose matrices take at most so many bits each.

    Args:
        recipe: ``mixed`` or ``mixed-gptq``.
        bits: stored bits of all matrices divided by their number of elements.
        title: the row's title.
    """

    def plan(yardstick: Yardstick) -> QuantPlan:
        model = yardstick.model
        shapes = model.weights.shapes().values()
        vectors = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
        nbytes = int(bits * parameters(model, vectors=False) / 8 + 1e-6)
        return mixed_plan(model, recipe, nbytes + vectors, ["onnx", "coreml"])

    return Contender(title, plan, _own(recipe, round(bits, 6)), MIXED)


def _own(recipe: str, bits: float | None = None) -> dict[str, Any]:
    return {"recipe": recipe, "bits": bits, "code": code_digest(ROOT, _CODE)}
