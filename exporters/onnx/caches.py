"""Int8 caches: the scales by which ONNX Runtime's attention kernel rounds keys and values.

The kernel takes one scale for a whole cache or, as here, one for each key/value head and column; it
cannot take one for each token. So the scales are constants of the graph, and values beyond their
range are clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.onnx.graph import GraphBuilder

LARGEST_CODE: Final = 127
# The codes reach this many times as far as the values of the calibration text.
MARGIN: Final = 1.0
# A column's scale is at least this share of its cache's largest scale, because a column that is
# zero on the whole calibration text may be used by another text.
_LEAST_SHARE: Final = 1e-3

NOTE: Final = (
    "keys and values are kept as int8 with static scales, one for each key/value head and column, "
    "from the calibration text, and values beyond their range are clipped; ONNX Runtime's kernel "
    "cannot take a scale for each token"
)


@dataclass(frozen=True)
class CacheScales:
    """The scales of one layer's caches.

    Attributes:
        key: the key cache's scales, ``float32[1, kv_heads, 1, head_dim]``.
        value: the value cache's scales, in the same shape.
    """

    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]


def scales_of(key: npt.NDArray[np.float32], value: npt.NDArray[np.float32]) -> CacheScales:
    """Computes the scales of one layer's caches.

    Args:
        key: how far from zero each column of the keys reaches, ``float32[kv_heads, head_dim]``.
        value: how far from zero each column of the values reaches, in the same shape.

    >>> reach = np.array([[254.0, 0.0]], np.float32)
    >>> bool(np.allclose(scales_of(reach, reach).key, [2.0 * MARGIN, 0.002 * MARGIN]))
    True
    """
    return CacheScales(_scales(key), _scales(value))


def _scales(reach: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    # No scale may be 0: the kernel would divide by 1 when it writes, and multiply by 0 when it
    # reads.
    least = _LEAST_SHARE * (reach.max() or np.float32(1))
    scales = np.maximum(reach, least) * np.float32(MARGIN / LARGEST_CODE)
    return scales.astype(np.float32)[None, :, None, :]


def scale_operands(builder: GraphBuilder, at: str, scales: CacheScales) -> list[str]:
    """GroupQueryAttention's operands after the rotary tables, up to and with the two scales."""
    absent = ["", "", ""]  # the operator's position_ids, attention_bias and head_sink
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
