"""What `edgeforge doctor` finds out about this machine, and how it is told."""

from __future__ import annotations

import os
import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final

from edgeforge.cache import cache_dir
from edgeforge.cli.trials import try_all
from edgeforge.sizes import size_text
from quant.processors import processor_name

_WIDTH: Final = 80
# The extras that people install, as `pyproject.toml` names them, and what each is for.
EXTRAS: Final = {
    "onnx": "runs ONNX artifacts",
    "coreml": "runs Core ML artifacts in Apple's runtime, on a Mac",
    "executorch": "runs ExecuTorch artifacts",
    "genai": "runs ONNX artifacts in onnxruntime-genai",
}


@dataclass(frozen=True)
class Package:
    """A package that EdgeForge asks for.

    Attributes:
        name: as the registry knows it.
        version: that is installed; None when it is not.
        needed: the versions that EdgeForge takes, such as ``>=2.0``.
        extra: the extra that brings it; None for what every installation has.
        fits: whether an installed version is one that EdgeForge takes; True when none is installed.
    """

    name: str
    version: str | None
    needed: str
    extra: str | None
    fits: bool


@dataclass(frozen=True)
class TargetReport:
    """What was tried of a target.

    Attributes:
        export_error: why exporting does not work; None when it works.
        runtime: what ran the artifact here; None when nothing did.
        run_error: why running does not work; None when it works.
    """

    export_error: str | None
    runtime: str | None
    run_error: str | None


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels.

    Attributes:
        built: whether they are there; None when that could not be found out.
        instruction_set: the widest vectors that they use on this processor.
        error: why nothing is known of them.
    """

    built: bool | None
    instruction_set: str | None
    error: str | None


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Attributes:
        edgeforge: the installed version; None when EdgeForge runs from a folder.
        python: version.
        system: operating system and architecture.
        processor: its model's name.
        cores: processors that this process may use.
        memory_bytes: of the machine; None where the system does not tell.
        cache_folder: where weight stores and digests are kept.
        cache_bytes: what they take.
        kernels: the compiled kernels.
        packages: what EdgeForge asks for, in the order of ``pyproject.toml``.
        targets: what was tried, by target.
    """

    edgeforge: str | None
    python: str
    system: str
    processor: str
    cores: int
    memory_bytes: int | None
    cache_folder: str
    cache_bytes: int
    kernels: Kernels
    packages: tuple[Package, ...]
    targets: dict[str, TargetReport]

    @property
    def export_problems(self) -> list[str]:
        """Why exporting does not work, a sentence each; empty when it works for every target."""
        found: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            if target.export_error is not None:
                found.setdefault(target.export_error, []).append(name)
        return [f"exporting to {', '.join(names)} fails: {why}" for why, names in found.items()]

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {**asdict(self), "export_works": not self.export_problems}


def examine() -> Report:
    """Looks at this installation and machine, and tries what EdgeForge does with both."""
    from exporters.registry import TARGETS

    kernels, tried = try_all(tuple(TARGETS))
    return Report(
        edgeforge=_version("edgeforge"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor_name(),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        cache_folder=str(cache_dir()),
        cache_bytes=folder_bytes(cache_dir()),
        kernels=Kernels(**kernels),
        packages=packages(),
        targets={name: TargetReport(**answer) for name, answer in tried.items()},
    )


def packages() -> tuple[Package, ...]:
    """What the installed EdgeForge asks for; nothing when it runs from a folder."""
    try:
        asked = requires("edgeforge") or []
    except PackageNotFoundError:
        return ()
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, asked):
        if requirement.name == "edgeforge":  # an extra that is made of others
            continue
        for extra in (None, *EXTRAS):
            if requirement.marker is None:
                belongs = extra is None
            else:
                belongs = extra is not None and requirement.marker.evaluate({"extra": extra})
            if belongs:
                installed = _version(requirement.name)
                fits = installed is None or requirement.specifier.contains(installed, True)
                needed = str(requirement.specifier)
                found.append(Package(requirement.name, installed, needed, extra, fits))
    return tuple(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows, or a system without the name
        return None


def folder_bytes(folder: Path) -> int:
    """Sizes of all files in a folder, links not followed; what cannot be read counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone in the meantime
                continue
    return total


def report_lines(report: Report) -> list[str]:
    """What a person reads: a verdict first, then targets, machine and packages."""
    return [
        *_verdict(report),
        "",
        *_target_lines(report),
        "",
        *_machine_lines(report),
        *_package_lines(report),
    ]


def _verdict(report: Report) -> list[str]:
    works = [name for name, each in report.targets.items() if each.export_error is None]
    runs = [name for name, each in report.targets.items() if each.run_error is None]
    return [
        _wrapped(f"Exporting works here to: {', '.join(works) or 'no target'}."),
        _wrapped(f"Running works here for: {', '.join(runs) or 'no target'}."),
    ]


def _target_lines(report: Report) -> list[str]:
    width = max(map(len, report.targets), default=0) + 2
    lines = []
    for name, target in report.targets.items():
        if target.export_error is not None:
            told = f"export fails: {target.export_error}"
        elif target.run_error is not None:
            told = f"export works; running fails: {target.run_error}"
        else:
            told = f"export works; runs in {target.runtime}"
        lines.append(_wrapped(told, name.ljust(width)))
    return lines


def _machine_lines(report: Report) -> list[str]:
    kernels = report.kernels
    if kernels.built is None:
        built = f"could not be tried: {kernels.error}"
    elif kernels.built:
        built = f"compiled; instruction set: {kernels.instruction_set}"
    else:
        built = (
            "not compiled, so quantization runs in PyTorch and is slower: install EdgeForge again "
            "where there is a C compiler"
        )
    memory = "" if report.memory_bytes is None else f", {size_text(report.memory_bytes)} of memory"
    rows = {
        "edgeforge": report.edgeforge or "runs from a folder, not installed as a package",
        "python": f"{report.python} on {report.system}",
        "processor": f"{report.processor}, {report.cores} cores{memory}",
        "kernels": built,
        "cache": f"{report.cache_folder}, {size_text(report.cache_bytes)}",
    }
    return [_wrapped(words, name.ljust(11)) for name, words in rows.items()]


def _package_lines(report: Report) -> list[str]:
    if not report.packages:
        return []
    width = max(len(each.name) for each in report.packages) + 2
    lines = []
    for extra in (None, *EXTRAS):
        rows = [each for each in report.packages if each.extra == extra]
        title = "What exporting needs" if extra is None else f"{extra}: {EXTRAS[extra]}"
        missing = any(each.version is None for each in rows)
        install = "edgeforge" if extra is None else f"edgeforge[{extra}]"
        lines += ["", f'{title}: pip install "{install}"' if missing else title]
        for each in rows:
            found = each.version or "not installed"
            unfit = "" if each.fits else f", but EdgeForge needs {each.needed}"
            lines.append(f"  {each.name.ljust(width)}{found}{unfit}")
    return lines


def _wrapped(words: str, first: str = "") -> str:
    """Words in lines of 80 columns, all but the first set in under ``first``."""
    return "\n".join(
        textwrap.wrap(
            words,
            _WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
