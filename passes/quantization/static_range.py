"""The one grid of a tensor that static 8-bit activations use: over all that calibration saw, or clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.errors import RecipeError
from ...ir.formats import Format, Grid, grid_between
from ..statistics import HistogramResult, ValueStatistics

PERCENTILE = "percentile:"
CANDIDATES = 128


def range_kinds(how: str) -> frozenset[str]:
    """The statistics `static_grid` reads. Raises RecipeError, in a sentence, for a way of choosing that there is not."""
    if how == "minmax":
        return frozenset({"min", "max"})
    if how == "mse" or how.startswith(PERCENTILE) and _is_percent(how.removeprefix(PERCENTILE)):
        return frozenset({"min", "max", "histogram"})
    raise RecipeError(f'no range named {how!r}; there are "minmax", "mse" and "percentile:99.99" (or another percentage above 50)')


def static_grid(known: ValueStatistics, form: Format, how: str) -> Grid:
    """Scale and zero point, both 0-d.

    how: "minmax" covers all that was seen; "percentile:P" all but the largest |x|, which P percent of the elements stay
    below; "mse" clips where the squared error of rounding and clipping is least.
    """
    low, high = known.min.min(), known.max.max()
    if how == "minmax":
        return grid_between(low, high, form)
    if how == "mse":
        return _least_squares(known.histogram, low, high, form)
    limit = known.histogram.percentile(float(how.removeprefix(PERCENTILE)))
    return grid_between(low.clamp(min=-limit), high.clamp(max=limit), form)


def _least_squares(histogram: HistogramResult, low: Tensor, high: Tensor, form: Format) -> Grid:
    edges, counts = histogram.edges, histogram.counts.double()
    x = (edges[1:] + edges[:-1]) / 2
    limit = torch.maximum(high, -low) * torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
    on = grid_between(torch.maximum(low, -limit), torch.minimum(high, limit), form)  # [candidates, 1]
    clipped = torch.clamp(x, (form.low - on.zero_point) * on.scale, (form.high - on.zero_point) * on.scale)
    within = on.scale.square() / 12  # rounding errors are spread evenly over a step, which bins are too wide to tell
    best = int(((clipped - x).square().maximum(within) * counts).sum(1).argmin())
    return Grid(on.scale[best, 0], on.zero_point[best, 0])


def _is_percent(text: str) -> bool:
    try:
        return 50 < float(text) <= 100
    except ValueError:
        return False
