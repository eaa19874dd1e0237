"""shift_linear as the integer product of its codes, which 8 bits hold exactly; the file keeps four bits a code and term."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.formats import ACTIVATIONS
from ...ir.pot import unpack_codes
from . import linear_int8_dynamic, linear_token


def ort(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """The forms of linear_int8_dynamic and linear_token, the terms side by side as outputs of one product. What unpacks the
    codes reads nothing but a constant: onnxruntime does it once, when it loads the file, and then packs and fuses the product.

    Float activations meet float weights that are made when the file is loaded: MatMulNBits has no powers of two.
    """
    parts = list(unpack_codes(w, x.shape[-1]))
    if activations == "none":
        weight = sum((part.to(x.dtype) * s[:, None] for part, s in zip(parts, scale)), start=torch.zeros((), dtype=x.dtype))
        return torch.nn.functional.linear(x, weight, b)
    product = linear_int8_dynamic.ort if ACTIVATIONS[activations].per == "tensor" else linear_token.ort
    if len(parts) == 1:
        return product(x, parts[0], scale[0], b)
    first, second = product(x, torch.cat(parts), scale.flatten()).chunk(2, -1)
    return first + second if b is None else first + second + b


pure = ort
