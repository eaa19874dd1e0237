"""Weights of 7 bits where a CPU sums pairs of u8 x s8 products in 16 bits: 2 * 255 * 127 saturates there, 2 * 255 * 63 does not."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

from .scheme import Scheme

BITS = 7
SAYS = (
    "weights have 7 bits (codes -63 to 63): the target has AVX2 or AVX-512 without VNNI or AMX, where sums of two 8-bit products saturate 16 bits; "
    "name a target with VNNI for all 8"
)

_VECTORS = ("avx2", "avx512f")  # names no other architecture has
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")  # products are added in 32 bits


def reduced_range(scheme: Scheme, target: Any) -> Scheme:
    """The scheme with 7-bit weights if it has 8-bit ones in integer products, and the target (kind, features) would saturate; else as it is.

    Activations of fewer bits are u8 codes around 128 in these products and saturate too. A target that lists no features is not
    known to. specs/quant_shiftadd.md 6, R14.
    """
    if scheme.activations is None or (scheme.weights.kind, scheme.weights.bits) != ("int", 8) or not saturates(target):
        return scheme
    return replace(scheme, weights=replace(scheme.weights, bits=BITS))


def saturates(target: Any) -> bool:
    """Whether a target is a CPU known to add products of bytes in 16 bits."""
    features: Set[str] = target.features if target is not None and target.kind == "cpu" else frozenset()
    return any(f in features for f in _VECTORS) and not any(f in features for f in _WIDE_SUMS)
