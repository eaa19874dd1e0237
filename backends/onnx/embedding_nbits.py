"""embedding_nbits as GatherBlockQuantized: one node that reads packed rows and makes them float."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.onnx.ops import symbolic

from ...ir.ops.embedding_nbits import embedding_nbits


def ort(ids: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """com.microsoft.GatherBlockQuantized, bit-equal to the op. 2 bits, float zero points and groups it does not take stay Gathers and arithmetic."""
    if bits == 2 or group_size < 16 or group_size & (group_size - 1) or zero_point is not None and zero_point.is_floating_point():
        return embedding_nbits(ids, w, scale, zero_point, bits, group_size)
    given = (w.flatten(1), ids, scale) if zero_point is None else (w.flatten(1), ids, scale, zero_point)
    attributes: dict[str, Any] = {"bits": bits, "block_size": group_size, "gather_axis": 0, "quantize_axis": 1}
    width = scale.shape[1] * group_size
    return symbolic("com.microsoft::GatherBlockQuantized", given, attributes, dtype=scale.dtype, shape=(*ids.shape, width))
