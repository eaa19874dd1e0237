"""Our semantic ops, one a file: importing this package registers `torch.ops.rewright.*`. Meanings first, kernels later."""

from . import add_layer_norm as add_layer_norm

OPS = ("add_layer_norm",)
"""Every op of ours by name; `ir.ops.<name>` holds its meaning and its `cases`."""
