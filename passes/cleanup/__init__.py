"""The canonical form: one spelling of everything, raised to single nodes (DESIGN 2). `CANONICAL` is the order."""

from .canonical_linear import CanonicalLinear
from .canonical_views import CanonicalViews
from .drop_no_ops import DropNoOps
from .fold_constants import FoldConstants
from .merge_duplicates import MergeDuplicates
from .raise_attention import RaiseAttention
from .raise_gelu import RaiseGELU
from .raise_layer_norm import RaiseLayerNorm
from .raise_rms_norm import RaiseRMSNorm
from .raise_rope import RaiseRope
from .raise_silu import RaiseSiLU
from .remove_dead_code import RemoveDeadCode

CANONICAL = (
    CanonicalViews,
    DropNoOps,
    CanonicalLinear,
    FoldConstants,
    MergeDuplicates,  # masks and squares computed twice are one node before patterns look for them
    RemoveDeadCode,  # a dead reader would make a pattern's inner value look used elsewhere
    RaiseGELU,
    RaiseSiLU,
    RaiseLayerNorm,
    RaiseRMSNorm,
    RaiseRope,
    RaiseAttention,
    DropNoOps,
    MergeDuplicates,
    RemoveDeadCode,
)
"""The passes that establish the canonical form, in order; a pass may stand in it twice."""
