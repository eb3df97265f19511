"""What an earlier report has of devices, which a later verification on this host must not lose."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from edgeforge.verification.freshness import Freshness
from edgeforge.verification.report_file import REPORT, REPORT_VERSION
from quant.input_files import read_input
from quant.sealed_json import unseal

_LARGEST: Final = 256 << 20


def kept_elsewhere(
    folder: Path, freshness: Freshness | None, devices: Collection[str]
) -> list[dict[str, Any]]:
    """The evaluations on devices of a report that is about to be replaced.

    They are kept where the artifact, the checkpoint and the versions of what measured them are the
    same, and the device was not asked again.

    Args:
        folder: the artifact.
        freshness: what the new report depends on; None keeps nothing.
        devices: what was verified now, as the report names devices.
    """
    try:
        earlier = unseal(read_input(folder / REPORT, _LARGEST))
        if freshness is None or earlier.get("schema_version") != REPORT_VERSION:
            return []
        before = Freshness.from_json(earlier["freshness"])
        rows = earlier.get("elsewhere") or []
        known = [row for row in rows if row["device"] not in devices]
    except (OSError, ValueError, KeyError, TypeError):  # none, or none that can be believed
        return []
    same = all(
        getattr(before, name) == getattr(freshness, name)
        for name in ("manifest", "checkpoint", "tools")
    )
    return known if same else []
