"""`Evaluation`: what is known of one artifact's accuracy and cost, as ``report.json`` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from device_harness.timing import Timings
from edgeforge.output_folder.whole_file import whole_file
from edgeforge.verification.adapted import AdapterFigures
from edgeforge.verification.bounds import Checked
from edgeforge.verification.curve import PositionCurve
from edgeforge.verification.finite import NotFinite
from edgeforge.verification.freshness import Freshness
from edgeforge.verification.greedy import GreedyAgreement
from edgeforge.verification.intervals import BlockSums, Intervals
from edgeforge.verification.kept_elsewhere import kept_elsewhere
from edgeforge.verification.metrics import Divergence, Perplexity
from edgeforge.verification.report_file import REPORT, REPORT_VERSION
from edgeforge.verification.routing import Routing
from edgeforge.verification.shipped import Shipped
from quant.json_output import json_text
from quant.sealed_json import seal

# Which lowering errors are told as large, in nats a token: those over the first bound, and those
# over the second that are more than a share of the quantization error. SmolLM2-135M at int4 has
# 1.7e-3 to 4.0e-3 where large activations stay float32, and 4.7e-3 to 1.6e-2 where not.
LARGE_LOWERING, SMALL_LOWERING, LARGE_SHARE = 5e-3, 1e-3, 0.05


@dataclass(frozen=True)
class Evaluation:
    """One artifact's accuracy and cost.

    Attributes:
        target: the runtime's format.
        recipe: how it was quantized.
        runtime: what ran it, or what stood in for it.
        text: what text it was measured on.
        tokens: tokens of it, in blocks of ``block`` tokens.
        block: tokens of a block.
        text_tokens: tokens that the whole text has, cut into such blocks.
        perplexity: of ``float``, ``quantized`` and ``artifact``.
        quantization: QUANTIZED against FLOAT.
        lowering: ARTIFACT against QUANTIZED.
        total: ARTIFACT against FLOAT.
        intervals: 95 % intervals of the means above; None where there are too few blocks.
        not_finite: of those of ``float``, ``quantized`` and ``artifact`` that gave NaN or infinity,
            at how many positions and where they come from.
        greedy_quantized: greedy tokens of the artifact against QUANTIZED's.
        greedy_float: against FLOAT's.
        stored_weights_equal: whether the integers and scales read back from the artifact's files
            equal those of the weight store, bit for bit. That they equal what the manifest records
            was checked before.
        weights_unlike_store: the weights that do not.
        other_processor: whether these may differ because another kind of processor exported the
            artifact: all come from a calibration or a rotation, in which floats are rounded.
        weight_store: the folder of that store, which was found in the cache or made for this.
        bits_per_weight: stored bits over parameters.
        artifact_bytes: size of all files.
        timings: what running it costs here; None when it was not timed.
        limits: what the runtime that ran it here cannot know of the one it stands in for.
        rounds_activations: whether the runtime's kernels round activations to 8 bits where
            QUANTIZED does not.
        shipped: what ships, run as an app runs it, against QUANTIZED at the same positions.
        checks: every figure and fact that was held against a bound, with what came out.
        sums: what the intervals were drawn from, for comparisons on the same tokens; None where
            there are no intervals.
        freshness: what all of it depends on; None where it was not verified.
        curve: the divergences along a block; None where they were not kept.
        device: where it ran: ``host``, or a device and the runtime's options there.
        device_facts: what is known of the device (`device_harness.devices.device.Facts`).
        device_limits: what running it there cannot tell, one sentence each.
        exit_layer: the checkpoint's layer after which the model is cut, in FLOAT and QUANTIZED as
            well; None where it is whole.
        adapters: names of the adapters that are merged into the weights, in FLOAT and QUANTIZED as
            well.
        with_adapters: what came out with each adapter that lies beside the weights.
        routing: how the artifact's tokens chose experts; None where the model has no mixture of
            them. Then ``lowering``, ``shipped`` and ``greedy_quantized`` are against QUANTIZED with
            the artifact's choices.
        elsewhere: evaluations of the same artifact on devices, on the same tokens and under the
            same bounds. These have no sums and no facts of the files, which are no other there.
        schema_version: of the report.
    """

    target: str
    recipe: str
    runtime: str
    text: str
    tokens: int
    block: int
    text_tokens: int
    perplexity: dict[str, Perplexity]
    quantization: Divergence
    lowering: Divergence
    total: Divergence
    intervals: Intervals | None
    not_finite: dict[str, NotFinite]
    greedy_quantized: GreedyAgreement
    greedy_float: GreedyAgreement
    stored_weights_equal: bool
    bits_per_weight: float
    artifact_bytes: int
    timings: Timings | None
    limits: tuple[str, ...] = ()
    weights_unlike_store: tuple[str, ...] = ()
    weight_store: str = ""
    other_processor: bool = False
    rounds_activations: bool = False
    checks: tuple[Checked, ...] = ()
    sums: BlockSums | None = None
    freshness: Freshness | None = None
    shipped: Shipped | None = None
    curve: PositionCurve | None = None
    device: str = "host"
    device_facts: Mapping[str, object] | None = None
    device_limits: tuple[str, ...] = ()
    exit_layer: int | None = None
    adapters: tuple[str, ...] = ()
    with_adapters: tuple[AdapterFigures, ...] = ()
    routing: Routing | None = None
    elsewhere: tuple[Evaluation, ...] = ()
    schema_version: int = REPORT_VERSION

    @property
    def perplexity_ratio(self) -> float:
        """The artifact's perplexity over FLOAT's."""
        return self.perplexity["artifact"].value / self.perplexity["float"].value

    @property
    def rounds_too_much(self) -> bool:
        """Whether the lowering error is large, and kernels that round activations explain it."""
        share = self.lowering.kl_mean > LARGE_SHARE * self.quantization.kl_mean
        small = self.lowering.kl_mean <= SMALL_LOWERING
        large = self.lowering.kl_mean > LARGE_LOWERING
        return self.rounds_activations and (large or (share and not small))

    def to_json(self) -> dict[str, object]:
        """The report as ``report.json`` holds it, where null stands for what is not finite."""
        elsewhere = [each.to_json() for each in self.elsewhere]
        own = asdict(replace(self, elsewhere=()))
        if self.routing is None:
            del own["routing"]
        return {**own, "elsewhere": elsewhere, "perplexity_ratio": self.perplexity_ratio}

    def write(self, folder: Path) -> Path:
        """Writes ``report.json`` beside the artifact's files, whole or not at all.

        It has a digest of its own content, so that nobody takes a changed report for a fresh one.
        What the report that it replaces has of other devices is kept (`kept_elsewhere`).
        """
        content = json.loads(json_text(self.to_json()))
        devices = [each.device for each in self.elsewhere]
        content["elsewhere"] += kept_elsewhere(folder, self.freshness, devices)
        with whole_file(folder / REPORT) as stream:
            stream.write((seal(content, indent=1) + "\n").encode())
        return folder / REPORT
