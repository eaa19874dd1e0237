"""What a canonical graph is built of: norms and their linears, attention and feed-forward blocks, streams, token axes, channel maps, edges."""

from .attention import AttentionBlock, Projection, attention_blocks
from .channel_tracer import Origin, Step
from .channels import ChannelMap, channel_map, origin
from .describe import describe, describe_tokens
from .edges import Edge, edges
from .feed_forward import FFNBlock, ffn_blocks
from .norms import NormLinears, norm_linears
from .residual import Stream, Streams, Writer, residual_streams
from .tokens import TokenAxis, token_axis
from .vocabulary import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "AttentionBlock",
    "ChannelMap",
    "Edge",
    "FFNBlock",
    "NormLinears",
    "Origin",
    "Projection",
    "Step",
    "Stream",
    "Streams",
    "TokenAxis",
    "Writer",
    "attention_blocks",
    "channel_map",
    "describe",
    "describe_tokens",
    "edges",
    "ffn_blocks",
    "norm_linears",
    "origin",
    "residual_streams",
    "token_axis",
]
