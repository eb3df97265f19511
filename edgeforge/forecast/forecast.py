"""The forecast of a model on a phone: every recipe's size, whether it fits, and bounds of speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from edgeforge.checkpoint.adapter import Adapter
from edgeforge.errors import UsageError
from edgeforge.export_options import check_caches
from edgeforge.families.facts import choose_context, facts_of
from edgeforge.families.spec import ModelSpec
from edgeforge.forecast.limits import HEADROOM, AppMemory, app_memory, parse_version
from edgeforge.forecast.mixtures import MixtureSizes, mixture_sizes
from edgeforge.forecast.profiles import Figure, Measurement, Phone, Profiles, load_profiles
from edgeforge.forecast.rows import RULE, TargetForecast, recipes_on
from edgeforge.forecast.sized_model import SizedModel
from edgeforge.forecast.speed import CACHED_BYTES
from edgeforge.model.low_rank import factor_numbers, refuse_names
from edgeforge.planning.choose import AS_IS, PLANNED
from exporters.checks import check_options
from exporters.errors import ExportError
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.plans.recipes import RECIPES, find_recipe

SCHEMA_VERSION: Final = 1
DEFAULT_TARGETS: Final = {"ios": ("coreml",), "android": ("onnx",)}
"""The target of a phone's system for which a forecast is made when none is named."""

_STATES_SINCE: Final = (18,)


@dataclass(frozen=True)
class Forecast:
    """What a model takes on a phone.

    Attributes:
        model: what the user named.
        model_type: its family.
        parameters: their number.
        context: the declared context, tokens.
        window: the window of all layers, tokens; 0 where there is none, or a layer has none.
        windows: how many layers with attention have each window; 0 for the whole context.
        phone: the phone.
        memory: what an app may take there.
        targets: one forecast each.
        published: what others measured on the phone.
        elsewhere: the least and the largest share of their bound that measurements on any phone
            reached.
        not_sized: recipes that need the weights, or a measurement, to be sized.
        warnings: what a reader must know, one sentence each.
        profiles: the sources.
        mixture: the sizes of a mixture of experts; None for a dense model.
        adapters: the names of the adapters beside the weights.
    """

    model: str
    model_type: str
    parameters: int
    context: int
    window: int
    windows: Mapping[int, int]
    phone: Phone
    memory: AppMemory
    targets: tuple[TargetForecast, ...]
    published: tuple[Measurement, ...]
    elsewhere: tuple[float, float]
    not_sized: tuple[str, ...]
    warnings: tuple[str, ...]
    profiles: Profiles = field(repr=False)
    mixture: MixtureSizes | None = None
    adapters: tuple[str, ...] = ()

    def share(self, measured: Measurement) -> float | None:
        """Returns a measurement's share of its own bound; None where the bound is not known."""
        return share_of_bound(self.profiles, measured)

    def cited(self) -> tuple[str, ...]:
        """Returns the keys of all sources that the forecast rests on, in order."""
        keys = [
            *(key for figure in self.phone.figures().values() for key in figure.sources),
            *self.memory.sources,
            *(key for each in self.published for key in each.sources),
        ]
        return tuple(dict.fromkeys(keys))

    def to_json(self) -> dict[str, object]:
        """The forecast for ``--json``."""
        figures = self.phone.figures()
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "context": self.context,
            "window": self.window,
            "windows": {str(window): count for window, count in self.windows.items()},
            "device": {
                "name": self.phone.name,
                "title": self.phone.title,
                "os": self.phone.os,
                **{name: _figure_json(figure) for name, figure in figures.items()},
            },
            "limit": {
                "bytes": self.memory.plain,
                "entitled_bytes": self.memory.entitled,
                "headroom": HEADROOM,
                "told": self.memory.told,
                "sources": list(self.memory.sources),
            },
            "rule": RULE,
            "mixture": None if self.mixture is None else asdict(self.mixture),
            "adapters": list(self.adapters),
            "targets": [
                {
                    "target": each.target,
                    "mixtures_that_fit": list(each.mixtures),
                    "best": each.best,
                    "needs": each.needs,
                    "recipes": [row.to_json() for row in each.rows],
                    "refused": each.refused,
                }
                for each in self.targets
            ],
            "published": [
                {
                    "model": each.model,
                    "weights": each.weights,
                    "runtime": each.runtime,
                    "decode_tokens_s": each.decode,
                    "prefill_tokens_s": each.prefill,
                    "read_bytes": each.read_bytes,
                    "read_from": each.read_from,
                    "share_of_bound": self.share(each),
                    "note": each.note,
                    "sources": list(each.sources),
                }
                for each in self.published
            ],
            "not_sized": list(self.not_sized),
            "warnings": list(self.warnings),
            "sources": {
                key: {"title": source.title, "url": source.url, "kind": source.kind}
                for key, source in ((key, self.profiles.sources[key]) for key in self.cited())
            },
        }


def forecast(
    model: SizedModel,
    device: str,
    *,
    context: int | None = None,
    os_version: str | None = None,
    memory: int | None = None,
    targets: Sequence[str] | None = None,
    recipes: Sequence[str] = (),
    options: TargetOptions | None = None,
    adapters: Sequence[Adapter] = (),
) -> Forecast:
    """Returns what a model takes on a phone, recipe by recipe; nothing is exported.

    Args:
        model: the model's sizes.
        device: the name of a profile.
        context: declared context in tokens; None for the model's own, at most 4096.
        os_version: version of the phone's system; None for the newest of which a limit is known.
        memory: bytes that an app may take, in place of the limit; None for the limit.
        targets: names of targets; None for the usual one of the phone's system.
        recipes: names, or YAML files of rules; none for all.
        options: options of the targets.
        adapters: adapters that are to lie beside the weights.

    Raises:
        CheckpointError: an adapter is of another model, or cannot lie beside the weights.
        UsageError: there is no such profile, the context is longer than the model's, or the version
            or an option cannot be.
        QuantizationError: there is no such recipe.
        ExportError: there is no such target, none of them holds any of the recipes, or one takes
            no adapters.
    """
    profiles = load_profiles()
    phone = profiles.phone(device)
    given = options or TargetOptions()
    chosen = [find_target(name) for name in dict.fromkeys(targets or DEFAULT_TARGETS[phone.os])]
    check_options(given, chosen)
    check_caches(model.spec, given)
    length = choose_context(model.spec, context)
    refuse_names(adapters, [each.name for each in chosen], given.given())
    beside = [factor_numbers(model.spec, adapter) for adapter in adapters]
    app = app_memory(phone, os_version, memory)
    names = tuple(dict.fromkeys(recipes)) or (*([AS_IS] if model.as_is else []), *RECIPES)
    for name in names:
        _check_name(name, model)
    facts = facts_of(model.spec, length, sum(sum(each.values()) for each in beside))
    adapted = frozenset().union(*beside)
    made = tuple(
        recipes_on(each, names, model, facts, given, phone, app, adapted) for each in chosen
    )
    if not any(each.rows for each in made):
        # What refuses every recipe is the model or an option: that is what the user must hear.
        raise ExportError(next(iter(made[0].refused.values())))
    shares = [s for each in profiles.published if (s := share_of_bound(profiles, each)) is not None]
    return Forecast(
        model=model.source,
        model_type=model.spec.model_type,
        parameters=model.spec.num_parameters,
        context=length,
        window=model.spec.window,
        windows=_windows(model.spec),
        phone=phone,
        memory=app,
        targets=made,
        published=profiles.measured_on(phone),
        elsewhere=(min(shares), max(shares)),
        not_sized=() if recipes else tuple(name for name in PLANNED if name not in names),
        warnings=(*app.warnings, *_warnings(phone, os_version, made, given)),
        profiles=profiles,
        mixture=mixture_sizes(model.spec),
        adapters=tuple(adapter.name for adapter in adapters),
    )


def share_of_bound(profiles: Profiles, measured: Measurement) -> float | None:
    """Returns which share of its bound by bandwidth a measurement reached; None without one."""
    bandwidth = profiles.phones[measured.phone].bandwidth
    if bandwidth is None:
        return None
    return measured.decode * measured.read_bytes / (bandwidth.number * 1e9)


def _windows(spec: ModelSpec) -> dict[int, int]:
    """How many layers with attention have each window, 0 for the whole context."""
    return dict(sorted(Counter(layer.window for layer in spec.layers if layer.num_heads).items()))


def _check_name(name: str, model: SizedModel) -> None:
    if name == AS_IS and model.as_is is None:
        raise UsageError(
            f"recipe {AS_IS} keeps weights as the checkpoint has them, and {model.source} was read "
            f"as a configuration alone: name the folder of the whole checkpoint"
        )
    if name in PLANNED and name != AS_IS:
        raise UsageError(
            f"recipe {name} chooses formats under a budget, by measurements of the weights: its "
            f"size is the budget, which `export --max-size` sets"
        )
    if name != AS_IS:
        find_recipe(name, PLANNED)


def _warnings(
    phone: Phone, version: str | None, made: Sequence[TargetForecast], options: TargetOptions
) -> list[str]:
    told = []
    if phone.bandwidth is None:
        told.append(f"the memory bandwidth of {phone.title} was not found: no speed is bounded")
    rows = [row for each in made for row in each.rows]
    if phone.bandwidth is not None and any(row.work.weights < CACHED_BYTES for row in rows):
        told.append(
            "weights of less than 64 MiB may stay in a processor's own caches, which are faster "
            "than its memory: the bounds of speed do not hold for them"
        )
    old = phone.os == "ios" and version is not None and parse_version(version) < _STATES_SINCE
    if old and options.opset != "ios17" and any(each.target == "coreml" for each in made):
        told.append(
            f"Core ML packages with states need iOS 18: for iOS {version} export, and plan, with "
            f"--opset ios17"
        )
    return told


def _figure_json(figure: Figure) -> dict[str, object]:
    return {"value": figure.value, "sources": list(figure.sources), "note": figure.note}
