"""Holds weights as the file has them against the plan, and vectors against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from edgeforge.model.model import Model
from edgeforge.verification.meaning.decoder import Decoder
from edgeforge.verification.meaning.findings import Findings
from exporters.float_columns import ALL
from exporters.lifted import (
    Array,
    Bias,
    EntryPoint,
    LayerNorm,
    Linear,
    Norm,
    Precision,
    Reading,
    StoredFormat,
    StoredWeight,
)
from exporters.lifted_recurrent import (
    Gain,
    Recurrence,
)
from exporters.manifest import Manifest
from exporters.manifest_records import WeightRecord
from quant.formats.activations import NONE
from quant.formats.formats import FloatFormat, IntFormat, parse_format
from quant.plans.algorithms import ALGORITHMS
from quant.plans.plan import matrix_shape


class Stored:
    """Compares formats, precisions and the values of norms, biases and convolutions.

    Args:
        manifest: the artifact's, which records the plan.
        model: the checkpoint's model.
        reading: what the files say.
        findings: takes what is found.
    """

    def __init__(
        self, manifest: Manifest, model: Model, reading: Reading, findings: Findings
    ) -> None:
        self.manifest, self.model = manifest, model
        self.reading, self.findings = reading, findings
        # A rotation, or factors that an algorithm divides a matrix's inputs by, move into norms and
        # biases.
        self.vectors_change = manifest.rotation is not None or any(
            record.algorithm in ALGORITHMS and ALGORITHMS[record.algorithm].rescales
            for record in manifest.weights.values()
        )
        self._vectors: dict[str, Array] = {}
        findings.fact("formats", "every weight is stored in the plan's format")
        findings.fact("precision", "every product has the expected precision")
        findings.fact("operators", "every operator is of the expected kind and delegate")
        findings.fact("norm_weights", "every norm's weight is the checkpoint's")
        findings.fact("bias_weights", "every bias holds the checkpoint's numbers")
        findings.fact("convolution_weights", "every convolution's weight is the checkpoint's")
        findings.fact("recurrence_weights", "factors, decays and bonuses are the checkpoint's")

    def hold(self, entry: EntryPoint, decoder: Decoder) -> None:
        """Compares an entry point."""
        self.operators(entry)
        read = {decoder.embedding.weight.name: decoder.embedding.weight.format}
        self._format(entry.name, decoder.embedding.weight.name, decoder.embedding.weight.format)
        for product in decoder.products():
            weight = product.weight
            read[weight.name] = weight.format
            self._format(entry.name, weight.name, weight.format)
            self._precision(entry.name, product)
        for fact, vector, values in _vectors(decoder):
            read[vector.name] = vector.format
            self._format(entry.name, vector.name, vector.format)
            self._values(fact, entry.name, vector, values)
        unused = [name for name in self.manifest.weights if name not in read]
        self.findings.same(
            "weights",
            not unused,
            entry.name,
            f"{entry.name} does not read {', '.join(unused[:3])}",
        )

    def operators(self, entry: EntryPoint) -> None:
        """Notes operators that are outside of the expected kinds and delegates."""
        outside = _told(entry.outside)
        self.findings.same("operators", not outside, entry.name, f"{entry.name} has {outside}")

    def _format(self, entry: str, name: str, found: StoredFormat) -> None:
        record = self.manifest.weights.get(name)
        if record is None:
            self.findings.same("formats", False, name, f"{entry} reads {name}, not in the plan")
            return
        wanted = planned(record)
        left = found.bits == 0 and wanted.bits > 0
        words = f"is {found}" if not left else f"was left {found}"
        self.findings.same(
            "formats",
            found == wanted,
            name,
            f"{entry}: {name} {words} in the file; the plan says {record.format} ({wanted})",
        )

    def _precision(self, entry: str, product: Linear) -> None:
        name = product.weight.name
        record = self.manifest.weights.get(name)
        if record is None:
            return
        wanted, columns = self._expected(record)
        found = product.precision, product.float_columns
        self.findings.same(
            "precision",
            found == (wanted, columns),
            name,
            f"{entry}: the product with {name} takes activations as {_precise(*found)}, "
            f"not {_precise(wanted, columns)}",
        )

    def _expected(self, record: WeightRecord) -> tuple[Precision, tuple[int, ...]]:
        format = parse_format(record.format)
        if record.activation != NONE:
            rounded: Precision = (
                "int8-token" if record.activation == "int8-token" else "int8-tensor"
            )
            return rounded, ()
        if isinstance(format, FloatFormat):
            half = format.name == "fp16"
            return (self.reading.halves if half else self.reading.floats), ()
        if self.reading.integers == "float16" or not isinstance(format, IntFormat):
            return self.reading.integers, ()
        if record.float_columns == ALL:
            return "float32", ()
        assert isinstance(record.float_columns, tuple)
        return self.reading.integers, record.float_columns

    def _values(self, fact: str, entry: str, weight: StoredWeight, found: Array) -> None:
        """Vectors that the plan changes are those of the weight store, which is compared apart."""
        name, kind = weight.name, weight.format.kind
        if self.vectors_change or name not in self.model.spec.weights:
            return
        if name not in self._vectors:
            self._vectors[name] = self.model.weights.float_weight(name).numpy()
        wanted = self._vectors[name]
        if kind == "fp16":
            wanted = wanted.astype(np.float16).astype(np.float32)
        if kind == "bf16":
            wanted = _as_bfloat16(wanted)
        self.findings.same(
            fact,
            np.array_equal(found, wanted),
            name,
            f"{entry}: {name} holds other numbers than the checkpoint",
        )


def _vectors(decoder: Decoder) -> Iterator[tuple[str, StoredWeight, Array]]:
    """Every norm, bias and convolution: the fact about its numbers, its weight and the numbers."""
    for step in decoder.steps():
        if isinstance(step, Norm):
            yield "norm_weights", step.weight, step.values
        elif isinstance(step, LayerNorm):
            if step.weight is not None and step.values is not None:
                yield "norm_weights", step.weight, step.values
            if step.bias is not None and step.shift is not None:
                yield "norm_weights", step.bias, step.shift
        elif isinstance(step, Bias):
            yield "bias_weights", step.weight, step.values
    for convolution in decoder.convolutions():
        yield "convolution_weights", convolution.weight, convolution.values
    for part in decoder.recurring():
        for gain in part.of(Gain):
            yield "recurrence_weights", gain.weight, gain.values
        for made in part.of(Recurrence):
            if isinstance(made.decay, StoredWeight) and made.decays is not None:
                yield "recurrence_weights", made.decay, made.decays
            if made.bonus is not None and made.bonuses is not None:
                yield "recurrence_weights", made.bonus, made.bonuses


def planned(record: WeightRecord) -> StoredFormat:
    """How a file must hold a weight of this plan."""
    format = parse_format(record.format)
    if isinstance(format, FloatFormat):
        return StoredFormat(format.name)
    rows, columns = matrix_shape(record.shape)
    if isinstance(format, IntFormat):
        return StoredFormat("int", format.bits, format.groups(columns), not format.symmetric)
    return StoredFormat("palette", format.bits, format.groups(rows))


def _precise(precision: str, columns: tuple[int, ...]) -> str:
    return precision + (f" except columns {list(columns[:4])}" if columns else "")


def _told(outside: Iterable[str]) -> str:
    listed = list(dict.fromkeys(outside))
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _as_bfloat16(values: Array) -> Array:
    """Rounds float32 to bfloat16, ties to even, and back."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
