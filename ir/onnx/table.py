"""Every ONNX operator we read, one line each: its torch function, the opset it holds from, which inputs it takes as numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import attention as a
from . import elementwise as e
from . import neural as n
from . import quantized as q
from . import reductions as r
from . import shapes as s


@dataclass(frozen=True)
class Op:
    """One operator from one opset on."""

    name: str
    function: Callable[..., Any]
    since: int = 1
    numbers: tuple[int, ...] = ()
    """Inputs that must be known while tracing; the function gets them as lists."""
    known: tuple[int, ...] = ()
    """Inputs that the function takes as `Known` where they are."""
    scalars: bool = False
    """Whether known single numbers may meet the tensors as Python numbers."""
    outputs: bool = False
    """Whether the function is told how many outputs are wanted."""
    grows: bool = False
    """Whether the output may be much larger than the inputs; such are not computed ahead."""
    domain: str = ""


def _same(*names: str, **options: Any) -> list[Op]:
    """Operators that torch has under the same name in lower case."""
    return [Op(name, getattr(torch, name.lower()), **options) for name in names]


def _ort(name: str, function: Callable[..., Any], outputs: bool = False) -> Op:
    """An operator of onnxruntime's own domain."""
    return Op(name, function, outputs=outputs, domain="com.microsoft")


OPS = (
    # element by element
    *_same("Abs", "Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan"),
    *_same("Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Tanh", "Sigmoid", "Relu", "Erf", "IsNaN"),
    Op("Neg", torch.neg),
    Op("Softplus", e.softplus),
    Op("Softsign", torch.nn.functional.softsign),
    Op("Mish", e.mish),
    Op("Not", torch.logical_not),
    Op("BitwiseNot", torch.bitwise_not),
    Op("IsInf", e.is_infinite),
    Op("Elu", e.elu),
    Op("Selu", e.selu),
    Op("Celu", e.celu),
    Op("Gelu", e.gelu),
    Op("LeakyRelu", e.leaky_relu),
    Op("PRelu", e.prelu),
    Op("HardSigmoid", e.hard_sigmoid),
    Op("HardSwish", e.hard_swish),
    Op("Swish", e.swish),
    Op("SwiGLU", e.swiglu),
    Op("ThresholdedRelu", e.thresholded_relu),
    Op("Shrink", e.shrink),
    Op("Clip", e.clip, scalars=True),
    Op("Softmax", e.softmax_matrix),
    Op("Softmax", e.softmax, 13),
    Op("LogSoftmax", e.log_softmax_matrix),
    Op("LogSoftmax", e.log_softmax, 13),
    Op("Hardmax", e.hardmax_matrix),
    Op("Hardmax", e.hardmax, 13),
    # Python's own operators: 0.5 * x is mul(x, 0.5), and c < x is gt(x, c)
    Op("Add", operator.add, 7, scalars=True),
    Op("Sub", operator.sub, 7, scalars=True),
    Op("Mul", operator.mul, 7, scalars=True),
    Op("Div", e.divide, 7, scalars=True),
    Op("Pow", e.power, 7, scalars=True),
    Op("Mod", e.modulo, scalars=True),
    Op("Sum", e.add_all),
    Op("Mean", e.mean_of),
    Op("Max", e.maximum),
    Op("Min", e.minimum),
    Op("And", torch.logical_and, 7),
    Op("Or", torch.logical_or, 7),
    Op("Xor", torch.logical_xor, 7),
    Op("BitwiseAnd", torch.bitwise_and),
    Op("BitwiseOr", torch.bitwise_or),
    Op("BitwiseXor", torch.bitwise_xor),
    Op("BitShift", e.shift),
    *(Op(f"{name}Window", e.window(*terms), numbers=(0,), grows=True) for name, terms in e.WINDOWS.items()),
    Op("Equal", operator.eq, 7, scalars=True),
    Op("Less", operator.lt, 7, scalars=True),
    Op("LessOrEqual", operator.le, scalars=True),
    Op("Greater", operator.gt, 7, scalars=True),
    Op("GreaterOrEqual", operator.ge, scalars=True),
    Op("Where", e.where, scalars=True),
    # shapes, cutting, joining
    Op("Shape", s.shape, known=(0,)),
    Op("Size", s.size, known=(0,)),
    Op("Reshape", s.reshape, 5, numbers=(1,)),
    Op("Flatten", s.flatten),
    Op("Squeeze", s.squeeze),
    Op("Squeeze", s.squeeze, 13, numbers=(1,)),
    Op("Unsqueeze", s.unsqueeze),
    Op("Unsqueeze", s.unsqueeze, 13, numbers=(1,)),
    Op("Transpose", s.transpose),
    Op("Concat", s.concat, 4),
    Op("Split", s.split, 2, numbers=(1,), outputs=True),
    Op("Slice", s.slice_attribute),
    Op("Slice", s.cut, 10, numbers=(1, 2, 3, 4)),
    Op("Gather", s.gather, known=(1,)),
    Op("GatherElements", s.gather_elements),
    Op("GatherND", s.gather_nd),
    Op("Scatter", s.scatter_elements),
    Op("ScatterElements", s.scatter_elements),
    Op("ScatterND", s.scatter_nd),
    Op("TensorScatter", s.tensor_scatter),
    Op("Expand", s.expand, numbers=(1,), grows=True),
    Op("Tile", s.tile, 6, numbers=(1,), grows=True),
    Op("Pad", s.pad_attribute, 2, grows=True),
    Op("Pad", s.pad, 11, numbers=(1, 3), known=(2,), grows=True),
    Op("CenterCropPad", s.center_crop_pad, numbers=(1,), grows=True),
    Op("ConstantOfShape", s.constant_of_shape, numbers=(0,), grows=True),
    Op("Range", s.arange, known=(0, 1, 2), grows=True),
    Op("EyeLike", s.eye_like),
    Op("OneHot", s.one_hot, numbers=(1,), grows=True),
    Op("TopK", s.top_k_attribute),
    Op("TopK", s.top_k, 10, numbers=(1,)),
    Op("Trilu", s.triangle, numbers=(1,)),
    Op("DepthToSpace", s.depth_to_space),
    Op("SpaceToDepth", s.space_to_depth),
    Op("CumSum", s.cumulative_sum, numbers=(1,)),
    Op("CumProd", s.cumulative_product, numbers=(1,)),
    Op("ReverseSequence", s.reverse_sequence),
    Op("Compress", s.compress, known=(1,)),
    Op("Col2Im", s.column_to_image, numbers=(1, 2)),
    Op("Cast", s.cast),
    Op("CastLike", s.cast_like, known=(1,)),
    Op("BitCast", s.bit_cast),
    Op("Identity", s.identity, known=(0,)),
    Op("Dropout", s.dropout, known=(1, 2), outputs=True),
    # reductions
    Op("ReduceSum", r.reduce_sum),
    Op("ReduceSum", r.reduce_sum, 13, numbers=(1,)),
    *(
        Op(name, function, since, numbers=(1,) if since == 18 else ())
        for name, function in (
            ("ReduceMean", r.reduce_mean),
            ("ReduceProd", r.reduce_prod),
            ("ReduceMax", r.reduce_max),
            ("ReduceMin", r.reduce_min),
            ("ReduceL1", r.reduce_l1),
            ("ReduceL2", r.reduce_l2),
            ("ReduceLogSum", r.reduce_log_sum),
            ("ReduceLogSumExp", r.reduce_log_sum_exp),
            ("ReduceSumSquare", r.reduce_sum_square),
        )
        for since in (1, 18)
    ),
    Op("ArgMax", r.arg_max),
    Op("ArgMin", r.arg_min),
    # networks
    Op("MatMul", n.matmul),
    Op("Gemm", n.gemm, 7),
    Op("Einsum", n.einsum),
    Op("Det", n.determinant),
    Op("Conv", n.conv),
    Op("ConvTranspose", n.conv_transpose),
    Op("MaxPool", n.max_pool, outputs=True),
    Op("AveragePool", n.average_pool),
    Op("LpPool", n.lp_pool, 2),
    Op("GlobalAveragePool", n.global_average_pool),
    Op("GlobalMaxPool", n.global_max_pool),
    Op("GlobalLpPool", n.global_lp_pool, 2),
    Op("MaxUnpool", n.max_unpool, numbers=(2,)),
    Op("BatchNormalization", n.batch_norm, 7, outputs=True),
    Op("InstanceNormalization", n.instance_norm, 6),
    Op("LayerNormalization", n.layer_norm, outputs=True),
    Op("GroupNormalization", n.group_norm_by_group, 18),
    Op("GroupNormalization", n.group_norm, 21),
    Op("RMSNormalization", n.rms_norm),
    Op("LpNormalization", n.lp_normalization),
    Op("MeanVarianceNormalization", n.mean_variance_normalization),
    Op("LRN", n.local_response_norm),
    Op("Upsample", n.upsample_7, 7, grows=True),
    Op("Upsample", n.resize_10, 9, numbers=(1,), grows=True),
    Op("Resize", n.resize_10, 10, numbers=(1,), grows=True),
    Op("Resize", n.resize, 11, numbers=(1, 2, 3), grows=True),
    Op("GridSample", n.grid_sample),
    Op("AffineGrid", n.affine_grid, numbers=(1,), grows=True),
    Op("NegativeLogLikelihoodLoss", n.negative_log_likelihood),
    Op("SoftmaxCrossEntropyLoss", n.softmax_cross_entropy, outputs=True),
    Op("Attention", a.attention, 23, outputs=True),
    Op("RotaryEmbedding", a.rotary, 23),
    # 8- and 4-bit codes
    Op("QuantizeLinear", q.quantize, 10),
    Op("DequantizeLinear", q.dequantize, 10),
    Op("DynamicQuantizeLinear", q.dynamic_quantize),
    Op("MatMulInteger", q.matmul_integer),
    Op("ConvInteger", q.conv_integer),
    Op("QLinearMatMul", q.qlinear_matmul),
    Op("QLinearConv", q.qlinear_conv),
    # onnxruntime's own
    _ort("LayerNormalization", n.layer_norm, outputs=True),
    Op("SimplifiedLayerNormalization", n.rms_norm),
    _ort("SimplifiedLayerNormalization", n.rms_norm),
    _ort("SkipLayerNormalization", a.skip_layer_norm, outputs=True),
    _ort("SkipSimplifiedLayerNormalization", a.skip_rms_norm, outputs=True),
    _ort("EmbedLayerNormalization", a.embed_layer_norm, outputs=True),
    _ort("Attention", a.packed_attention, outputs=True),
    _ort("MultiHeadAttention", a.multi_head_attention, outputs=True),
    _ort("RotaryEmbedding", a.rotary_ort),
    _ort("Gelu", e.gelu),
    _ort("BiasGelu", e.bias_gelu),
    _ort("FastGelu", e.fast_gelu),
    _ort("QuickGelu", e.quick_gelu),
    _ort("FusedGemm", n.fused_gemm),
    _ort("FusedConv", n.fused_conv),
    _ort("FusedMatMul", n.fused_matmul),
    _ort("MatMulNBits", q.matmul_nbits),
    _ort("MatMulIntegerToFloat", q.matmul_integer_to_float),
    _ort("DynamicQuantizeMatMul", q.dynamic_quantize_matmul),
    _ort("QGemm", q.qgemm),
    _ort("QLinearAdd", q.qlinear_of_two(torch.add)),
    _ort("QLinearMul", q.qlinear_of_two(torch.mul)),
    _ort("QLinearSigmoid", q.qlinear_sigmoid),
    _ort("QLinearLeakyRelu", q.qlinear_leaky_relu),
    _ort("QuantizeLinear", q.quantize),
    _ort("DequantizeLinear", q.dequantize),
)
"""What can be imported. Of one name the last that is not newer than the file's opset holds."""

_BY_NAME: dict[tuple[str, str], list[Op]] = {}
for _op in OPS:
    _BY_NAME.setdefault((_op.domain, _op.name), []).append(_op)


def find(domain: str, name: str, version: int) -> Op | None:
    """The line for an operator at an opset, or None."""
    domain = "" if domain == "ai.onnx" else domain
    fitting = [op for op in _BY_NAME.get((domain, name), ()) if op.since <= version]
    return max(fitting, key=lambda op: op.since, default=None)


def names(domain: str = "") -> list[str]:
    """All operators of a domain that we read."""
    return sorted({op.name for op in OPS if op.domain == domain})
