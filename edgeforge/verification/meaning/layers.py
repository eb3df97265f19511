"""Holds the layers of a recognised decoder against the checkpoint's spec."""

from __future__ import annotations

from edgeforge.families.assembly import EMBEDDING, HEAD, NORM_MATRIX
from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.attending import Attending
from edgeforge.verification.meaning.attentions import Attentions
from edgeforge.verification.meaning.choosing import Choosing
from edgeforge.verification.meaning.decoder import Convolving, Decoder, Layer, Mixer
from edgeforge.verification.meaning.fed import Fed
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.head_mixture import HeadMixture
from edgeforge.verification.meaning.recurrent import Recurrent
from edgeforge.verification.meaning.recurring import Recurring
from edgeforge.verification.meaning.rotary import Rotary
from edgeforge.verification.meaning.steps import Steps, open_facts
from exporters.lifted import EntryPoint, StoredWeight


class Layers:
    """Compares every layer of an entry point.

    Args:
        spec: the spec of the program, which may be a rotated one.
        context: the declared context, tokens.
        multiple: what caches' lengths are rounded up to a multiple of.
        rotary: what the rotary tables must hold.
        findings: takes what is found.
    """

    def __init__(
        self, spec: ModelSpec, context: int, multiple: int, rotary: Rotary, findings: Findings
    ) -> None:
        self.spec, self.context, self.rotary, self.findings = spec, context, rotary, findings
        self.steps, self.recurrent = Steps(spec, findings), Recurrent(spec, findings)
        self.choosing = Choosing(spec, self.steps, findings)
        self.fed = Fed(spec, self.steps, self.choosing, findings)
        length = -(-context // multiple) * multiple
        self.attentions = Attentions(
            spec, context, length, rotary, self.steps, self.choosing, findings
        )
        self._open()

    def _open(self) -> None:
        spec, fact = self.spec, self.findings.fact
        fact("layers", f"there are {len(spec.layers)} layers", len(spec.layers))
        self.rotary.open(self.findings)
        self.attentions.visible.open()
        fact("context", f"caches and tables are made for {self.context} tokens", self.context)
        fact("positions", "tokens are rotated and cached at their own positions")
        fact("ties", f"the head is {'' if spec.tied else 'not '}the embedding")
        open_facts(spec, self.findings)
        fact("block", "every part reads the residual stream where the checkpoint says")
        self.choosing.open()
        self.fed.open()
        fact("caches", "every layer reads and writes its own caches")
        fact("states", "every layer has its own states, of which a text begins with none")
        self.recurrent.open()
        self.attentions.open()
        fact("weights", "every operation reads its own layer's weight")

    def hold(self, entry: EntryPoint, decoder: Decoder) -> None:
        """Compares an entry point."""
        spec, same, name = self.spec, self.findings.same, entry.name
        count = len(decoder.layers)
        if not same(
            "layers",
            count == len(spec.layers),
            name,
            f"{name} has {count} layers, not {len(spec.layers)}",
        ):
            self.findings.number("layers", count)
            return
        self._weight(name, decoder.embedding.weight, EMBEDDING)
        wanted = EMBEDDING if spec.tied else HEAD
        found = decoder.head.weight.name
        same("ties", found == wanted, name, f"{name}: the head reads {found}, not {wanted}")
        hold = self.steps.hold
        hold(name, "the embedding", decoder.embedded, expected.embedded(spec))
        hold(name, "the head's operand", decoder.final, expected.final(spec))
        hold(name, "the result", decoder.logits, expected.logits(spec))
        matrix = decoder.norm_matrix
        stands = matrix is not None
        same(
            "norms",
            stands == spec.norm_matrix,
            name,
            f"{name} has {'a' if stands else 'no'} matrix between the last norm and the head",
        )
        if matrix is not None:
            self._weight(name, matrix.weight, NORM_MATRIX)
        for index, (layer, wanted_layer) in enumerate(
            zip(decoder.layers, spec.layers, strict=True)
        ):
            self._layer(entry, index, layer, wanted_layer)
        self._distinct(entry, decoder)

    def _layer(self, entry: EntryPoint, index: int, layer: Layer, wanted: LayerSpec) -> None:
        spec, same = self.spec, self.findings.same
        at, place = f"model.layers.{index}.", f"{entry.name}, layer {index}"
        words, fits = _mixing(layer.mixer, wanted)
        if not same(
            "layers",
            fits,
            place,
            f"{place} mixes tokens by {words}, not by {wanted.mixer.replace('_', ' ')}",
        ):
            return
        where = "before the layer" if layer.parallel else "after the layer's first part"
        same(
            "block",
            layer.parallel == (spec.block == "parallel"),
            place,
            f"{place}: the feed-forward part reads the residual stream {where}",
        )
        if isinstance(layer.mixer, Attending | HeadMixture):
            self.attentions.hold(entry, index, layer.mixer, wanted)
            mixed = isinstance(layer.mixer, HeadMixture)
            out = "self_attn.output" if mixed else "self_attn.o_proj"
        elif isinstance(layer.mixer, Recurring):
            self.recurrent.hold(place, index, layer.mixer, wanted)
            out = ""  # the form of the whole part has its bias
        else:
            self._convolving(place, index, layer.mixer)
            out = "conv.out_proj"
        entering = expected.entering_mixer(spec, at)
        self.steps.hold(place, "the first part's operand", layer.mixer.entering, entering)
        leaving = expected.leaving(spec, at, "attention_output_norm", out)
        self.steps.hold(place, "the first part's result", layer.mixed, leaving)
        if isinstance(layer.feed_forward, Recurring) or wanted.feed_forward == "channel_mix":
            self._channels(place, index, layer, wanted)
        else:
            self.fed.hold(place, at, layer, wanted)

    def _channels(self, place: str, index: int, layer: Layer, wanted: LayerSpec) -> None:
        at, part, same = f"model.layers.{index}.", layer.feed_forward, self.findings.same
        mixes = isinstance(part, Recurring)
        words = "mixes channels, which the checkpoint does not do"
        words = words if mixes else "mixes no channels, which the checkpoint does"
        wants = wanted.feed_forward == "channel_mix"
        if not same("channel_mix", mixes == wants, place, f"{place} {words}"):
            return
        assert isinstance(part, Recurring)
        entering = expected.entering_feed_forward(self.spec, at)
        self.steps.hold(place, "the feed-forward part's operand", part.entering, entering)
        self.recurrent.hold_channels(place, index, part)
        leaving = expected.leaving(self.spec, at, "mlp_output_norm", "")
        self.steps.hold(place, "the feed-forward part's result", layer.fed, leaving)

    def _weight(self, place: str, found: StoredWeight, wanted: str) -> None:
        self.findings.same(
            "weights",
            found.name == wanted,
            place,
            f"{place} reads {found.name} where it must read {wanted}",
        )

    def _convolving(self, place: str, index: int, part: Convolving) -> None:
        spec, same, hold = self.spec, self.findings.same, self.steps.hold
        at, width = f"model.layers.{index}.conv.", spec.hidden_size
        self._weight(place, part.into.weight, f"{at}in_proj.weight")
        self._weight(place, part.convolution.weight, f"{at}conv.weight")
        self._weight(place, part.out.weight, f"{at}out_proj.weight")
        bias = expected.biased(spec, f"{at}in_proj")
        for what, made in (
            ("the convolution's gate", part.gate),
            ("the convolution's operand", part.factors[0]),
            ("the convolution's operand", part.factors[1]),
        ):
            hold(place, what, made, bias)
        convolved = expected.biased(spec, f"{at}conv")
        hold(place, "the convolution's result", part.convolved, convolved)
        found = [each.span("a convolution's part") for each in (part.gate, *part.factors)]
        wanted = [(first * width, (first + 1) * width) for first in (1, 0, 2)]
        same(
            "weights",
            [found[0], *sorted(found[1:])] == wanted,
            place,
            f"{place} gates and convolves other columns than {wanted}",
        )
        self.recurrent.state(place, part.convolution.recent, f"{index}.recent")

    def _distinct(self, entry: EntryPoint, decoder: Decoder) -> None:
        """No two layers may share a cache or a state; a text's first call takes states as zeros."""
        for fact, words, names in (
            ("caches", "caches", _caches(decoder)),
            ("states", "states", [each.read for each in decoder.states()]),
        ):
            shared = sorted({name for name in names if names.count(name) > 1})
            if names:
                several = f"{entry.name}: several layers share the {words} {', '.join(shared)}"
                self.findings.same(fact, not shared, entry.name, several)
        for each in decoder.states():
            ignored, state = each.ignored, each.read
            if ignored is None:
                self.findings.unread(f"whether {entry.name} begins a text with empty states")
                continue
            for probe, empty in zip(entry.probes, ignored, strict=True):
                does = "ignores" if empty else "does not ignore"
                self.findings.same(
                    "states",
                    empty == (probe.start == 0),
                    entry.name,
                    f"{entry.name} {does} {state} where {probe.start} tokens come before",
                )


def _caches(decoder: Decoder) -> list[str]:
    mixers = [layer.mixer for layer in decoder.layers]
    attentions = [each.attention for each in mixers if isinstance(each, Attending | HeadMixture)]
    return [cache.read for each in attentions for cache in (each.keys, each.values)]


def _mixing(mixer: Mixer, wanted: LayerSpec) -> tuple[str, bool]:
    """How a layer mixes tokens, in words, and whether it must."""
    if isinstance(mixer, Attending | HeadMixture):
        return "attention", wanted.mixer == "attention"
    if isinstance(mixer, Convolving):
        return "a short convolution", wanted.mixer == "short_conv"
    return "a recurrence", wanted.recurrence is not None
