"""Caches of int8: the scales that ONNX Runtime's attention kernel rounds keys and values by.

The kernel takes one scale for a whole cache or, as here, one for each key/value head and column;
none for each token. So the scales are constants of the graph, and what lies beyond them is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.onnx.graph import GraphBuilder

LARGEST_CODE: Final = 127
# How much further than on the calibration text the codes reach.
MARGIN: Final = 1.0
# A column that the calibration text leaves at zero still gets this share of its cache's scale.
_LEAST_SHARE: Final = 1e-3

NOTE: Final = (
    "keys and values are kept as int8 with static scales, one for each key/value head and column, "
    "from the calibration text: what lies beyond is clipped; ONNX Runtime's kernel has no scales "
    "for each token"
)


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer's caches.

    Attributes:
        key: ``float32[1, kv_heads, 1, head_dim]``.
        value: likewise.
    """

    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]


def scales_of(key: npt.NDArray[np.float32], value: npt.NDArray[np.float32]) -> CacheScales:
    """Scales of one layer from how far its keys and values reach, ``float32[kv_heads, head_dim]``.

    >>> reach = np.array([[254.0, 0.0]], np.float32)
    >>> bool(np.allclose(scales_of(reach, reach).key, [2.0 * MARGIN, 0.002 * MARGIN]))
    True
    """
    return CacheScales(_scales(key), _scales(value))


def _scales(reach: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    # The kernel would divide by 1 where a scale is 0, and multiply by 0.
    least = _LEAST_SHARE * (reach.max() or np.float32(1))
    scales = np.maximum(reach, least) * np.float32(MARGIN / LARGEST_CODE)
    return scales.astype(np.float32)[None, :, None, :]


def scale_operands(builder: GraphBuilder, at: str, scales: CacheScales) -> list[str]:
    """The attention's operands from the rotary tables on to the scales' end; see the operator."""
    absent = ["", "", ""]  # positions, a bias, sinks
    return [
        *absent,
        builder.table(f"{at}.k_scale", scales.key),
        builder.table(f"{at}.v_scale", scales.value),
    ]


ATTRIBUTES: Final[dict[str, object]] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
