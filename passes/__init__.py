"""What we do to programs. Every pass there is, one line each; classes load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rewrite import Pass

# pass name -> module and class below this package
PASSES = {
    "canonical-views": "cleanup.canonical_views:CanonicalViews",
    "drop-no-ops": "cleanup.drop_no_ops:DropNoOps",
    "canonical-linear": "cleanup.canonical_linear:CanonicalLinear",
    "fold-constants": "cleanup.fold_constants:FoldConstants",
    "raise-gelu": "cleanup.raise_gelu:RaiseGELU",
    "raise-silu": "cleanup.raise_silu:RaiseSiLU",
    "raise-layer-norm": "cleanup.raise_layer_norm:RaiseLayerNorm",
    "raise-rms-norm": "cleanup.raise_rms_norm:RaiseRMSNorm",
    "raise-rope": "cleanup.raise_rope:RaiseRope",
    "raise-attention": "cleanup.raise_attention:RaiseAttention",
    "merge-duplicates": "cleanup.merge_duplicates:MergeDuplicates",
    "remove-dead-code": "cleanup.remove_dead_code:RemoveDeadCode",
    "fuse-add-layer-norm": "fusion.add_layer_norm:FuseAddLayerNorm",
    "fuse-add-rms-norm": "fusion.add_rms_norm:FuseAddRMSNorm",
    "fold-batch-norm": "fusion.fold_batch_norm:FoldBatchNorm",
    "pack-heads": "fusion.pack_heads:PackHeads",
    "group-heads": "fusion.group_heads:GroupHeads",
    "group-ffn": "fusion.group_ffn:GroupFFN",
    "merge-linears": "fusion.merge_linears:MergeLinears",
    "gelu-to-silu": "approximation.gelu_to_silu:GELUToSiLU",
    "mixed-precision": "quantization.mixed_precision:MixedPrecision",
    "outlier-migration": "outliers.outlier_migration:OutlierMigration",
    "rotate-residual": "outliers.rotate_residual:RotateResidual",
    "rotate-values": "outliers.rotate_values:RotateValues",
    "sort-channels": "outliers.sort_channels:SortChannels",
    "allocate": "factorization.allocate:Allocate",
    "ffn-width": "factorization.ffn_width:FFNWidth",
    "low-rank": "factorization.low_rank:LowRank",
    "block-structured": "factorization.block_structured:BlockStructured",
    "shift-add-attention": "shiftadd.shift_add_attention:ShiftAddAttention",
    "finetune": "training.finetune:Finetune",
    "ternary-import": "shiftadd.ternary_import:TernaryImport",
    "linear-attention": "linear_attention.linear_attention:LinearAttention",
    "sparse-attention": "linear_attention.sparse_attention:SparseAttention",
    "token-merging": "tokens.token_merging:TokenMerging",
    "visual-token-pruning": "tokens.visual_token_pruning:VisualTokenPruning",
    "quantize-embedding": "quantization.quantize_embedding:QuantizeEmbedding",
    "shift-linear": "shiftadd.shift_linear:ShiftLinear",
    "freeze-shift": "shiftadd.freeze_shift:FreezeShift",
    "dequantize-linear": "quantization.dequantize_linear:DequantizeLinear",
    "quantize-linear": "quantization.quantize_linear:QuantizeLinear",
}


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name. Raises RecipeError naming the nearest."""
    if name not in PASSES:
        from ..ir.errors import RecipeError, near

        raise RecipeError(f"no pass named {name!r}.{near(name, tuple(PASSES))} `rewright passes` lists all {len(PASSES)}")
    module, kind = PASSES[name].split(":")
    return getattr(import_module(f".{module}", __name__), kind)


def __getattr__(name: str) -> Any:
    """`rewright.passes.QuantizeLinear`, loaded on first use."""
    for place in PASSES.values():
        module, kind = place.split(":")
        if kind == name:
            return getattr(import_module(f".{module}", __name__), kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(place.split(":")[1] for place in PASSES.values())])
