"""ExecuTorch's delegates by the name that `--backend` takes, and the formats each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from exporters.checks import refuse_activation
from exporters.errors import ExportError, WeightRefused
from exporters.executorch.installed import require_executorch
from exporters.options import TargetOptions
from quant.formats.activations import TENSOR, TOKEN
from quant.formats.formats import IntFormat
from quant.plans.algorithms import POSITIVE
from quant.plans.plan import QuantPlan

XNNPACK: Final = "xnnpack"
GROUP_MULTIPLE: Final = 32
# Options of EdgeForge's own lowering that ExecuTorch's exporter, as it is used here, does not have.
_OWN_ONLY: Final = ("weights", "kv_cache", "activations", "draft_positions")


@dataclass(frozen=True)
class Backend:
    """A delegate.

    Attributes:
        title: the delegate's name in messages.
        check: refuses a weight's format that the delegate cannot hold; takes the weight's name
            and its format.
        tokens: how many tokens one run takes at most; None for the target's own limit.
        needs: what its programs need to run, where this host cannot run them; None where it can.
        notes: what a user must know about its arithmetic.
        packages: what its exporter imports besides ExecuTorch: the module's name, and what to
            install.
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
    """Whether ExecuTorch's own exporter lowers the program."""
    return options.lowering == "stock" or options.backend not in (None, XNNPACK)


def check_backend(plan: QuantPlan, options: TargetOptions) -> None:
    """Refuses formats a delegate cannot hold, options that exclude each other, missing packages.

    Raises:
        ExportError: says what is wrong, and what to do.
    """
    name = options.backend or XNNPACK
    backend = BACKENDS[name]
    if is_stock(options):
        flag = "--lowering stock" if name == XNNPACK else f"--backend {name}"
        if options.lowering == "edgeforge":
            raise ExportError(
                f"{flag} uses ExecuTorch's own exporter: leave out --lowering edgeforge"
            )
        for option in _OWN_ONLY:
            if options.given().get(option) not in (None, "internal", "auto"):
                given = option.replace("_", "-")
                raise ExportError(
                    f"--{given} needs EdgeForge's own lowering for XNNPACK: leave out --{given} or "
                    f"{flag}"
                )
        require_executorch(f"{flag} lowers with it")
        for activation in (TOKEN, TENSOR):
            refuse_activation(
                plan,
                activation,
                why=f"{flag} does not control how activations are rounded",
                use="EdgeForge's own lowering for XNNPACK, or a recipe that rounds only weights, "
                "such as int8",
            )
        for module, install in (backend.packages or {}).items():
            if find_spec(module) is None:
                raise ExportError(f'{flag} needs {module}: pip install "{install}"')
    for weight, assignment in plan.weights.items():
        if isinstance(assignment.format, IntFormat):
            backend.check(weight, assignment.format)
        if assignment.algorithm in POSITIVE:
            raise WeightRefused(
                f"{weight} is to be filled by {assignment.algorithm}, whose scales may be below "
                f"zero; programs for {backend.title} hold no such scales",
                f"use {POSITIVE[assignment.algorithm]}",
            )


def _check_width(weight: str, format: IntFormat, runtime: str) -> None:
    """Refuses integers that do not have 4 or 8 bits."""
    if format.bits not in (4, 8):
        use = "int4-g32 or int4-g64" if format.bits < 4 else "int8-pc"
        raise WeightRefused(
            f"{weight} is to be {format.name}; {runtime} has integers of 4 and 8 bits",
            f"use {use}",
        )


def _check_scales(weight: str, format: IntFormat, takes: str) -> None:
    """Refuses scales that are not bfloat16, which a checkpoint quantized elsewhere may have."""
    if format.scale_dtype != "bfloat16":
        raise WeightRefused(
            f"{weight} is {format.name}; {takes} scales as bfloat16",
            "round them with --imported-scales bfloat16, which keeps the integers and changes no "
            "scale by more than 0.2 %",
        )


def _check_xnnpack(weight: str, format: IntFormat) -> None:
    """Refuses formats that XNNPACK's kernels lack or would compute wrongly without an error."""
    size = format.group_size
    _check_width(weight, format, "XNNPACK")
    _check_scales(weight, format, "XNNPACK holds")
    if not format.symmetric:
        raise WeightRefused(
            f"{weight} is to be {format.name}; XNNPACK ignores zero points, which would give "
            f"wrong numbers",
            f"use {IntFormat(format.bits, size).name}"
            + (" or int8-pc" if format.bits == 4 else ""),
        )
    if format.bits == 8 and size is not None:
        raise WeightRefused(
            f"{weight} is to be {format.name}; XNNPACK holds 8-bit integers only with one scale a "
            f"row",
            f"use int8-pc, or int4-g{size}",
        )
    if size is not None and size % GROUP_MULTIPLE:
        raise WeightRefused(
            f"{weight} has groups of {size}; XNNPACK needs groups of a multiple of "
            f"{GROUP_MULTIPLE}",
            "use int4-g32, int4-g64 or int4-g128, or int8-pc",
        )


def _check_vulkan(weight: str, format: IntFormat) -> None:
    """Refuses formats that Vulkan's kernels lack; their products would be left to the CPU."""
    _check_scales(weight, format, "ExecuTorch's Vulkan delegate is given")
    if format.bits != 4 or not format.symmetric:
        raise WeightRefused(
            f"{weight} is to be {format.name}; ExecuTorch's Vulkan delegate computes with "
            f"symmetric 4-bit integers only",
            "use a recipe such as int4-g32, or fp32 for this weight",
        )
    if format.group_size is None or format.group_size % GROUP_MULTIPLE:
        raise WeightRefused(
            f"{weight} is to be {format.name}; ExecuTorch's Vulkan delegate needs groups of a "
            f"multiple of {GROUP_MULTIPLE}",
            "use int4-g32, int4-g64 or int4-g128",
        )


def _check_coreml(weight: str, format: IntFormat) -> None:
    """Refuses other formats than symmetric integers of 4 or 8 bits with bfloat16 scales.

    The exporter would read zero points as signed integers of the codes' width.
    """
    _check_width(weight, format, "what is written for ExecuTorch's Core ML delegate")
    _check_scales(weight, format, "ExecuTorch's Core ML delegate is given")
    if not format.symmetric:
        raise WeightRefused(
            f"{weight} is to be {format.name}; ExecuTorch's Core ML delegate is written for "
            f"symmetric integers",
            f"use {IntFormat(format.bits, format.group_size).name}, or --target coreml",
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
