"""`Card`: what ``CARD.md`` and ``card.json`` of an artifact say, gathered from what is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

from exporters.manifest import Manifest
from exporters.manifest_records import AdapterRecord
from exporters.target import Provenance
from quant.formats.formats import parse_format
from quant.plans.plan import matrix_shape

CARD_KIND: Final = "edgeforge-card"
CARD_VERSION: Final = 1


@dataclass(frozen=True)
class Measure:
    """A mean over the evaluated text, and the ends of its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class VerifiedThere:
    """What a verification found of an artifact on a device.

    Attributes:
        device: its name, and the runtime's options there.
        model: what it is.
        runtime: what ran the artifact.
        emulated: whether the processor is emulated.
        lowering_kl: of ARTIFACT, from QUANTIZED: nats a token.
        problems: why it is not sound there, one phrase each; nothing where it is.
    """

    device: str
    model: str
    runtime: str
    emulated: bool
    lowering_kl: Measure
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """What a verification found of an artifact.

    Attributes:
        how: ``measured`` where the target's own runtime ran it, ``interpreted`` where EdgeForge's
            interpreter stood in for that.
        runtime: what ran it.
        processor: the processor it ran on.
        limits: what an interpreter cannot know of the runtime it stands in for.
        text: what text the figures are of.
        tokens: tokens of it.
        text_tokens: tokens that the whole text has.
        kl: of ARTIFACT, from FLOAT: nats a token.
        quantization_kl: of QUANTIZED, from FLOAT.
        lowering_kl: of ARTIFACT, from QUANTIZED.
        perplexity_ratio: the artifact's perplexity over FLOAT's.
        top1: share of positions whose likeliest token is FLOAT's.
        stored_weights_equal: whether integers and scales equal the weight store's, bit for bit.
        passed: how many checks passed.
        doubtful: names of checks that more tokens would settle.
        problems: why the artifact is not sound, one phrase each; nothing where it is.
        elsewhere: what was found on devices.
        routing: what is said of the experts that tokens chose; empty where there is no mixture.
    """

    how: Literal["measured", "interpreted"]
    runtime: str
    processor: str
    limits: tuple[str, ...]
    text: str
    tokens: int
    text_tokens: int
    kl: Measure
    quantization_kl: Measure
    lowering_kl: Measure
    perplexity_ratio: Measure
    top1: Measure
    stored_weights_equal: bool
    passed: int
    doubtful: tuple[str, ...]
    problems: tuple[str, ...]
    elsewhere: tuple[VerifiedThere, ...] = ()
    routing: str = ""

    def to_json(self) -> dict[str, object]:
        """The object that ``card.json`` has under ``verified``."""
        made = asdict(self)
        if not self.routing:
            del made["routing"]
        return made


@dataclass(frozen=True)
class FormatShare:
    """The weights that are stored in one format.

    Attributes:
        format: its name.
        weights: how many matrices and vectors.
        bytes: that they take, scales and zero points included.
    """

    format: str
    weights: int
    bytes: int


def _adapter(record: AdapterRecord) -> dict[str, object]:
    """An adapter's row: its folder is a path of somebody's machine, and left out."""
    return {key: value for key, value in asdict(record).items() if key != "path"}


@dataclass(frozen=True)
class Card:
    """What an artifact's cards say.

    Attributes:
        manifest: the artifact's.
        provenance: where its weights come from.
        licence_id: the licence's identifier on the hub, as the checkpoint's model card states it;
            empty where it states none.
        verified: what a verification found; None where there was none yet.
    """

    manifest: Manifest
    provenance: Provenance
    licence_id: str
    verified: Verified | None

    @property
    def bytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def formats(self) -> list[FormatShare]:
        """What each weight format takes, the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for record in self.manifest.weights.values():
            count, size = found.get(record.format, (0, 0))
            stored = parse_format(record.format).nbytes(*matrix_shape(record.shape))
            found[record.format] = count + 1, size + stored
        shares = [FormatShare(name, *row) for name, row in found.items()]
        return sorted(shares, key=lambda share: -share.bytes)

    def to_json(self) -> Mapping[str, object]:
        """The content of ``card.json``, where None stands for what is not known."""
        manifest, origin = self.manifest, self.provenance
        return {
            "kind": CARD_KIND,
            "schema_version": CARD_VERSION,
            "title": origin.title,
            "source": {
                "model": origin.hub_id or None,
                "author": origin.author or None,
                "revision": manifest.source.revision,
                "sha256": manifest.source.sha256,
                "licence": origin.licence or None,
                "licence_id": self.licence_id or None,
            },
            "target": manifest.target,
            "entry": manifest.entry,
            "model_type": manifest.model.summary.get("model_type"),
            "parameters": manifest.model.summary.get("num_parameters"),
            "context": manifest.context,
            **({"exit_layer": cut} if (cut := manifest.model.exit_layer) else {}),
            **({"draft_positions": rows} if (rows := manifest.draft_positions) > 1 else {}),
            **({"adapters": list(map(_adapter, given))} if (given := manifest.adapters) else {}),
            "recipe": manifest.recipe,
            "rotation": None if manifest.rotation is None else asdict(manifest.rotation),
            "calibration": None if manifest.calibration is None else asdict(manifest.calibration),
            "bits_per_weight": manifest.bits_per_weight,
            "bytes": self.bytes,
            "formats": [asdict(share) for share in self.formats],
            "tools": manifest.tools,
            "warnings": list(manifest.warnings),
            "notes": list(manifest.notes),
            "verified": None if self.verified is None else self.verified.to_json(),
        }
