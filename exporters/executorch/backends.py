"""ExecuTorch's delegates by the name that `--backend` takes, and what each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from exporters.checks import refuse_activation
from exporters.errors import ExportError
from exporters.executorch.installed import require_executorch
from exporters.options import TargetOptions
from quant.formats.activations import TENSOR, TOKEN
from quant.formats.formats import IntFormat
from quant.plans.algorithms import POSITIVE
from quant.plans.plan import QuantPlan

XNNPACK: Final = "xnnpack"
GROUP_MULTIPLE: Final = 32
# What EdgeForge's own lowering writes and ExecuTorch's exporter, as it is used here, does not.
_OWN_ONLY: Final = ("weights", "kv_cache")


@dataclass(frozen=True)
class Backend:
    """A delegate.

    Attributes:
        title: its name for people.
        check: refuses a format of a weight, by name.
        tokens: how many one run takes at most; None for as many as a target's chunk.
        needs: what runs its programs, where that is not this host.
        notes: what a user must know of its arithmetic.
        packages: what its exporter imports, beside ExecuTorch: module, and what to install.
    """

    title: str
    check: Callable[[str, IntFormat], None]
    tokens: int | None = None
    needs: str | None = None
    notes: tuple[str, ...] = ()
    packages: Mapping[str, str] | None = None


def backend_of(options: Mapping[str, object]) -> Backend:
    """The delegate that a target's options ask for."""
    return BACKENDS[str(options.get("backend") or XNNPACK)]


def is_stock(options: TargetOptions) -> bool:
    """Whether ExecuTorch's own exporter lowers."""
    return options.lowering == "stock" or options.backend not in (None, XNNPACK)


def check_backend(plan: QuantPlan, options: TargetOptions) -> None:
    """Refuses what a delegate cannot hold, what was asked at odds, and packages that are missing.

    Raises:
        ExportError: what is wrong, and what to do.
    """
    name = options.backend or XNNPACK
    backend = BACKENDS[name]
    if is_stock(options):
        flag = "--lowering stock" if name == XNNPACK else f"--backend {name}"
        if options.lowering == "edgeforge":
            raise ExportError(
                f"{flag} is written by ExecuTorch's own exporter: leave out --lowering edgeforge"
            )
        for option in _OWN_ONLY:
            if options.given().get(option) not in (None, "internal"):
                given = option.replace("_", "-")
                raise ExportError(
                    f"--{given} is of EdgeForge's own lowering for XNNPACK: leave it or {flag} out"
                )
        require_executorch(f"{flag} lowers with it")
        for activation in (TOKEN, TENSOR):
            refuse_activation(
                plan,
                activation,
                why=f"{flag} promises nothing of activations",
                use="EdgeForge's own lowering for XNNPACK, or a recipe of weights alone such as "
                "int8",
            )
        for module, install in (backend.packages or {}).items():
            if find_spec(module) is None:
                raise ExportError(f'{flag} needs {module}: pip install "{install}"')
    for weight, assignment in plan.weights.items():
        if isinstance(assignment.format, IntFormat):
            backend.check(weight, assignment.format)
        if assignment.algorithm in POSITIVE:
            raise ExportError(
                f"{weight} is to be filled by {assignment.algorithm}; programs for {backend.title} "
                f"are written with no scales below zero: use {POSITIVE[assignment.algorithm]}"
            )


def _check_width(weight: str, format: IntFormat, runtime: str) -> None:
    """Refuses integers of other widths than 4 and 8 bits."""
    if format.bits not in (4, 8):
        use = "int4-g32 or int4-g64" if format.bits < 4 else "int8-pc"
        raise ExportError(
            f"{weight} is to be {format.name}; {runtime} has integers of 4 and 8 bits: use {use}"
        )


def _check_scales(weight: str, format: IntFormat, takes: str) -> None:
    """Refuses scales that are not bfloat16, which a checkpoint quantized elsewhere brings."""
    if format.scale_dtype != "bfloat16":
        raise ExportError(
            f"{weight} is {format.name}; {takes} scales as bfloat16: round them with "
            f"--imported-scales bfloat16, which keeps the integers and changes no scale by more "
            f"than 0.2 %"
        )


def _check_xnnpack(weight: str, format: IntFormat) -> None:
    """Refuses what XNNPACK's kernels do not have or would silently get wrong."""
    size = format.group_size
    _check_width(weight, format, "XNNPACK")
    _check_scales(weight, format, "XNNPACK holds")
    if not format.symmetric:
        raise ExportError(
            f"{weight} is to be {format.name}; XNNPACK ignores zero points, which would give "
            f"wrong numbers: use {IntFormat(format.bits, size).name}"
            + (" or int8-pc" if format.bits == 4 else "")
        )
    if format.bits == 8 and size is not None:
        raise ExportError(
            f"{weight} is to be {format.name}; XNNPACK holds 8 bits with one scale a row only: use "
            f"int8-pc, or int4-g{size}"
        )
    if size is not None and size % GROUP_MULTIPLE:
        raise ExportError(
            f"{weight} has groups of {size}; XNNPACK's need a multiple of {GROUP_MULTIPLE}: use "
            f"int4-g32, int4-g64 or int4-g128, or int8-pc"
        )


def _check_vulkan(weight: str, format: IntFormat) -> None:
    """Refuses what Vulkan's kernels do not have: they would be left to the CPU's."""
    _check_scales(weight, format, "ExecuTorch's Vulkan delegate is given")
    if format.bits != 4 or not format.symmetric:
        raise ExportError(
            f"{weight} is to be {format.name}; ExecuTorch's Vulkan delegate computes with "
            f"symmetric 4-bit integers only: use a recipe such as int4-g32, or fp32 for this weight"
        )
    if format.group_size is None or format.group_size % GROUP_MULTIPLE:
        raise ExportError(
            f"{weight} is to be {format.name}; ExecuTorch's Vulkan delegate needs groups of a "
            f"multiple of {GROUP_MULTIPLE}: use int4-g32, int4-g64 or int4-g128"
        )


def _check_coreml(weight: str, format: IntFormat) -> None:
    """Refuses zero points: the exporter takes them for signed integers of the codes' width."""
    _check_width(weight, format, "what is written for ExecuTorch's Core ML delegate")
    _check_scales(weight, format, "ExecuTorch's Core ML delegate is given")
    if not format.symmetric:
        raise ExportError(
            f"{weight} is to be {format.name}; ExecuTorch's Core ML delegate is written for "
            f"symmetric integers: use {IntFormat(format.bits, format.group_size).name}, or "
            f"--target coreml"
        )


BACKENDS: Final[Mapping[str, Backend]] = {
    XNNPACK: Backend("XNNPACK", _check_xnnpack),
    "vulkan": Backend(
        "Vulkan",
        _check_vulkan,
        needs="ExecuTorch's runtime with its Vulkan delegate and a GPU, as on an Android phone",
    ),
    "coreml": Backend(
        "Core ML",
        _check_coreml,
        tokens=1,
        needs="ExecuTorch's runtime with its Core ML delegate, on an Apple device",
        notes=("computes in float16, norms included",),
        packages={"coremltools": "edgeforge[coreml]", "torchao": "edgeforge[executorch]"},
    ),
}
