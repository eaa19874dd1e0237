"""multi_head_attention as the Attention operator of opset 23 with packed heads."""

from .attention import packed as ort

__all__ = ["ort"]
