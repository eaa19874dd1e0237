"""y = phi(x), the features of a linear attention's queries or keys        x: [b, h, n, d]   y: [b, h, n, D]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..feature_maps import KINDS, initial, named
from ._semantic import semantic


@semantic("feature_map(Tensor x, Tensor[] parameters, str kind, bool query=False) -> Tensor")
def feature_map(x: Tensor, parameters: list[Tensor], kind: str, query: bool = False) -> Tensor:
    """phi of ir/feature_maps.py, computed in float32 at least; what float16 can't hold becomes its largest number. Returns [b, h, n, D].

    query: x are queries. Some maps treat them otherwise: a factor of a query cancels where the sum of the weights is divided by, one of a key does not.
    """
    wide = x.float() if x.dtype.itemsize < 4 else x
    y = named(kind).formula(wide, parameters, query)
    return (y.clamp(max=torch.finfo(torch.float16).max) if x.dtype == torch.float16 else y).to(x.dtype)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every kind, for queries and for keys, a row of zeros, one whose exponentials overflow; a map without parameters last."""
    for kind in reversed(KINDS):
        for query in (False, True):
            x = torch.randn(2, 3, 5, 16, device=device, dtype=dtype)
            x[0, 0, 1] = 0
            if "exp" in kind:
                x[0, 1, 2] *= 200
            parameters = [p + 0.1 * torch.randn_like(p) for p in initial(kind, 3, 16, seed=1)]
            yield x, [p.to(device, dtype) for p in parameters], kind, query
