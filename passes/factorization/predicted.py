"""How long products of matrices take on a machine, by its roofline: what a factorization must beat, no device needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.errors import UsageError
from ...ir.graph import Graph


def product_seconds(target: Any, rows: int, products: Sequence[tuple[int, int]], dtype: torch.dtype) -> float:
    """Predicted seconds of dense products one after the other, each [rows, inputs] -> [rows, outputs], on a backends.target.Target.

    products: (inputs, outputs) of each. Every operand and result crosses memory once, every product is a launch.
    """
    return sum(_product(target, rows, inputs, outputs, dtype) for inputs, outputs in products)


def rows_of(graph: Graph, linear: fx.Node) -> int:
    """Tokens a linear sees at the example sizes of the graph."""
    return math.prod(graph.size(s) for s in linear.meta["val"].shape[:-1])


def kernel_seconds(target: Any, flops: int, moved: int, dtype: torch.dtype) -> float:
    """Predicted seconds of one launch that does some arithmetic and moves some bytes."""
    try:
        return target.seconds(flops, moved, 1, dtype)[0]
    except UsageError:  # a machine without units for the dtype computes in float32
        return target.seconds(flops, moved, 1, torch.float32)[0]


def _product(target: Any, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    moved = (rows * inputs + inputs * outputs + rows * outputs) * dtype.itemsize
    return kernel_seconds(target, 2 * rows * inputs * outputs, moved, dtype)
