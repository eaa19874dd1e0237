"""Our semantic ops, one a file: importing this package registers `torch.ops.rewright.*`. Meanings first, kernels later."""

from . import add_layer_norm as add_layer_norm
from . import add_rms_norm as add_rms_norm
from . import attention as attention
from . import block_attention as block_attention
from . import block_dense_linear as block_dense_linear
from . import block_shuffle_linear as block_shuffle_linear
from . import embedding_int8 as embedding_int8
from . import embedding_nbits as embedding_nbits
from . import feature_map as feature_map
from . import grouped_linear as grouped_linear
from . import hybrid_attention as hybrid_attention
from . import hybrid_attention_step as hybrid_attention_step
from . import linear_attention as linear_attention
from . import linear_attention_step as linear_attention_step
from . import linear_fp8 as linear_fp8
from . import linear_int8_dynamic as linear_int8_dynamic
from . import linear_int8_static as linear_int8_static
from . import linear_nbits as linear_nbits
from . import linear_token as linear_token
from . import multi_head_attention as multi_head_attention
from . import onnx_node as onnx_node
from . import quick_gelu as quick_gelu
from . import rms_norm as rms_norm
from . import rope as rope
from . import selective_scan as selective_scan
from . import shift_add_attention as shift_add_attention
from . import shift_linear as shift_linear
from . import shift_linear_ps as shift_linear_ps
from . import shift_linear_q as shift_linear_q
from . import ternary_linear as ternary_linear
from . import token_match as token_match
from . import token_match_energy as token_match_energy
from . import token_merge as token_merge
from . import token_places as token_places
from . import token_take as token_take

OPS = (
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "block_attention",
    "block_dense_linear",
    "block_shuffle_linear",
    "embedding_int8",
    "embedding_nbits",
    "feature_map",
    "grouped_linear",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "linear_attention_step",
    "linear_fp8",
    "linear_int8_dynamic",
    "linear_int8_static",
    "linear_nbits",
    "linear_token",
    "multi_head_attention",
    "quick_gelu",
    "rms_norm",
    "rope",
    "selective_scan",
    "shift_add_attention",
    "shift_linear",
    "shift_linear_ps",
    "shift_linear_q",
    "ternary_linear",
    "token_match",
    "token_match_energy",
    "token_merge",
    "token_places",
    "token_take",
)
"""Every op of ours with a meaning in torch by name (onnx_node has onnxruntime's); `ir.ops.<name>` holds its meaning and its `cases`."""
