"""Our semantic ops, one a file: importing this package registers `torch.ops.rewright.*`. Meanings first, kernels later."""

from . import add_layer_norm as add_layer_norm
from . import add_rms_norm as add_rms_norm
from . import attention as attention
from . import embedding_int8 as embedding_int8
from . import grouped_linear as grouped_linear
from . import linear_int8_dynamic as linear_int8_dynamic
from . import multi_head_attention as multi_head_attention
from . import quick_gelu as quick_gelu
from . import rms_norm as rms_norm
from . import rope as rope
from . import selective_scan as selective_scan

OPS = (
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "embedding_int8",
    "grouped_linear",
    "linear_int8_dynamic",
    "multi_head_attention",
    "quick_gelu",
    "rms_norm",
    "rope",
    "selective_scan",
)
"""Every op of ours by name; `ir.ops.<name>` holds its meaning and its `cases`."""
