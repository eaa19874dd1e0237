"""Capture hooks: library functions that torch.export can't trace as they are, replaced while a model is captured."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

ours = torch.ops.rewright


@dataclass(frozen=True)
class Hook:
    """`stand_in(original)` takes the place of `module.name` during a capture. It must give the original's numbers.

    name: of a function, `Class.method`, or a builtin that the module calls.
    """

    module: str
    name: str
    stand_in: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str


@contextlib.contextmanager
def hooks_in_place() -> Iterator[None]:
    """Replace every hooked function whose module is loaded (no model uses one that is not), and put all back after."""
    with contextlib.ExitStack() as undo:
        for hook in HOOKS:
            owner, _, leaf = hook.name.rpartition(".")
            place: Any = sys.modules.get(hook.module)
            place = getattr(place, owner, None) if owner else place
            if place is None:
                continue
            if leaf in vars(place):
                undo.callback(setattr, place, leaf, vars(place)[leaf])
            elif hasattr(builtins, leaf):
                undo.callback(delattr, place, leaf)
            else:
                continue  # a version of the library without it
            setattr(place, leaf, hook.stand_in(vars(place).get(leaf, getattr(builtins, leaf, None))))
        yield


def adopt_foreign_ops(graph: fx.Graph) -> None:
    """Ops of other libraries that mean the same as one of ours become ours, so that they save, load and export."""
    for node in graph.nodes:
        if (target := ADOPTED.get(str(node.target))) is not None:
            node.target = getattr(ours, target).default


# -- stand-ins --------------------------------------------------------------------------------------------------------


def _mamba_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if return_last_state:  # the state goes into a cache, which a capture does not have
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs)
        if delta_bias is not None:
            dt = dt + delta_bias.to(dt.dtype)[..., None]
        y = ours.selective_scan(hidden_states, F.softplus(dt) if delta_softplus else dt, A, B, C)
        y = y if D is None else y + hidden_states * D[None, :, None]
        return y if z is None else y * F.silu(z)

    return mamba_selective_scan


def _mamba2_scan(original: Callable[..., Any]) -> Callable[..., Any]:
    def mamba2_chunk_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, return_final_states: bool = False, **kwargs: Any
    ) -> Any:
        if return_final_states:  # padding would change the final state
            return original(hidden_states, dt, A, B, C, chunk_size, return_final_states=True, **kwargs)
        length = hidden_states.shape[1]
        extra = (length + chunk_size - 1) // chunk_size * chunk_size - length
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, extra)) for t in (hidden_states, dt, B, C))
        return original(x, dt, A, B, C, chunk_size, **kwargs)[:, :length]

    return mamba2_chunk_scan


def _list_of_image_features(original: Callable[..., Any]) -> Callable[..., Any]:
    def image_features(values: Any = ()) -> list[Any]:
        """They are concatenated right after, so all images in one tensor [images * patches, width] serve as well."""
        return [values.flatten(0, 1)] if isinstance(values, Tensor) and values.dim() == 3 else original(values)

    return image_features


def _attention_of_all_images(original: Callable[..., Any]) -> Callable[..., Any]:
    rotate = original.__globals__["apply_rotary_pos_emb_vision"]

    def forward(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        tokens = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(tokens, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)  # [tokens, heads, d]
        q, k = rotate(q, k, *position_embeddings)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        image = (torch.arange(tokens, device=hidden_states.device)[:, None] >= cu_seqlens[1:]).sum(1)  # which one a token is of
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(image[:, None] == image)[None, None], scale=self.scaling)
        return self.proj(y.transpose(1, 2).reshape(tokens, -1))

    return forward


# -- the tables -------------------------------------------------------------------------------------------------------

_SCAN = "a Python loop over the sequence: the trace would hold every step and fix the length"
_CHUNKS = "whether the length fills its chunks decides what is traced; padded to whole chunks first, one trace holds for all lengths"
_IMAGES = "a list of images: iterating over the batch fixes its size"
_SPLITS = "one attention an image, of sizes read from a tensor: one attention under a mask holds for any number and size of images"

HOOKS = (
    Hook("transformers.models.mamba.modeling_mamba", "mamba_selective_scan", _mamba_scan, _SCAN),
    Hook("transformers.models.falcon_mamba.modeling_falcon_mamba", "mamba_selective_scan", _mamba_scan, _SCAN),
    Hook("transformers.models.jamba.modeling_jamba", "mamba_selective_scan", _mamba_scan, _SCAN),
    Hook("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan", _mamba2_scan, _CHUNKS),
    Hook("transformers.models.llava.modeling_llava", "list", _list_of_image_features, _IMAGES),
    Hook("transformers.models.qwen2_vl.modeling_qwen2_vl", "VisionAttention.forward", _attention_of_all_images, _SPLITS),
)

ADOPTED = {"transformers.grouped_mm_fallback.default": "grouped_linear"}
"""Op of another library -> ours with the same arguments and meaning."""
