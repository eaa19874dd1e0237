"""Every kernel that compiled programs are made of, against float64: odd sizes, fewer rows than a tile, poisoned outputs, both widths of vector."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewright.backends.table import absent
from rewright.backends.target import cpu_features

if reason := absent("tvm"):
    pytest.skip(reason, allow_module_level=True)

from rewright.backends.tvm import arithmetic, gemm, nbits, rows
from rewright.backends.tvm.attention import Attention
from rewright.backends.tvm.batched import Batched
from rewright.backends.tvm.compat import IRBuilder, T, llvm_target, tvm
from rewright.backends.tvm.convolution import Convolution, pack_windows, plan_of
from rewright.backends.tvm.layout import ChannelsFirst, Padded
from rewright.backends.tvm.window import Window

AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
NO_VNNI = cpu_features() - {"avx512_vnni"}
CPUS = [pytest.param(cpu_features(), id="this"), pytest.param(AVX2, id="avx2", marks=pytest.mark.skipif(not cpu_features() >= AVX2, reason="no AVX2"))]
ROWS = [1, 3, 8, 11, 64, 65, 130]
"""Fewer than a tile, whole tiles, a tile that goes back, a second block."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "relu6": F.relu6,
}


def compiled(function: Any, features: Any) -> Callable[..., None]:
    return tvm.compile(function, target=llvm_target(features))["main"]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def worst(found: Tensor, wanted: Tensor) -> float:
    assert found.isfinite().all()
    return float((found - wanted).abs().max() / wanted.abs().max())


# -- elementary functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize(
    ("name", "meaning", "within"),
    [("exp", torch.exp, 88), ("exp_negative", torch.exp, 0), ("erf", torch.erf, 100), *((n, f, 100) for n, f in ACTIVATIONS.items())],
)
def test_elementary_functions(name: str, meaning: Callable[[Tensor], Tensor], within: float, lanes: int) -> None:
    function = getattr(arithmetic, name)
    n = 16 * 4096
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        x, y = (T.match_buffer(T.arg(key, T.handle()), (n,), "float32", align=4) for key in "xy")
        with T.serial(0, n // lanes) as i:
            at = T.ramp(i * lanes, 1, lanes) if lanes > 1 else i
            T.buffer_store(y, function(x[at]), [at])
    given = torch.cat([torch.linspace(-100, within, n // 2), torch.linspace(-2, min(within, 2), n // 2)])
    found = poisoned(n)
    compiled(builder.get(), cpu_features())(given, found)
    wanted = meaning(given.double())
    relative = name.startswith("exp") or name == "tanh"
    scale = wanted.abs().clamp(min=1e-37) if relative else wanted.abs().clamp(min=1)
    assert ((found - wanted).abs() / scale)[given > -87].max() < 6e-7
    assert (found - wanted).abs()[given <= -87].max() < 1e-5


# -- products ------------------------------------------------------------------------------------------------------------


@functools.cache
def product(features: frozenset[str], what: gemm.Product) -> tuple[Callable[..., None], gemm.Plan]:
    plan = gemm.Plan.of(features, what.out)
    return compiled(what.build(plan, "main"), features), plan


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize(
    ("width", "out", "activation", "residual", "bias"),
    [(64, 48, "gelu", False, True), (37, 100, "silu", True, True), (33, 31, None, False, False), (16, 128, "relu", True, False), (8, 5, "tanh", False, True)],
)
def test_product(features: Any, width: int, out: int, activation: str | None, residual: bool, bias: bool) -> None:
    torch.manual_seed(0)
    what = gemm.Product(width, out, bias=bias, activation=activation, residual=residual)
    run, plan = product(frozenset(features), what)
    w, b = torch.randn(out, width), torch.randn(out)
    for n in ROWS:
        x, r, y = torch.randn(n, width), torch.randn(n, out), poisoned(n, out)
        run(x, gemm.pack(w, plan), *([gemm.pack_channels(b, plan)] if bias else []), *([r] if residual else []), y)
        wanted = F.linear(x.double(), w.double(), b.double() if bias else None)
        wanted = ACTIVATIONS[activation](wanted) if activation else wanted
        assert worst(y, wanted + r if residual else wanted) < 1e-6, n


@pytest.mark.parametrize("features", [*CPUS, pytest.param(NO_VNNI, id="no-vnni")])
@pytest.mark.parametrize(("width", "out", "stepped"), [(64, 48, True), (37, 100, False), (33, 31, True)])
def test_product_of_codes_is_exact(features: Any, width: int, out: int, stepped: bool) -> None:
    """With scales that are powers of two nothing is rounded."""
    torch.manual_seed(0)
    run, plan = product(frozenset(features), gemm.Product(width, out, codes=True, stepped=stepped))
    w, b, zero = torch.randint(-127, 128, (out, width), dtype=torch.int8), torch.randint(-9, 9, (out,)).float(), 128 if stepped else 3
    scale = 2.0 ** torch.randint(-3, 3, (out,))
    weights = (
        gemm.pack_codes(w, plan),
        gemm.pack_channels(-zero * w.int().sum(1).to(torch.int32), plan),
        gemm.pack_channels(scale, plan),
        gemm.pack_channels(b, plan),
    )
    for n in ROWS:
        codes = torch.randint(0, 256, (n, rows.Sink.width(width)), dtype=torch.uint8)  # the codes behind the last channel are anything
        step, y = 2.0 ** torch.randint(-3, 3, (n,)), poisoned(n, out)
        run(codes, *([step] if stepped else []), *weights, y)
        wanted = (codes[:, :width].double() - zero) @ w.double().T * scale + 0
        wanted = (wanted * step[:, None] if stepped else wanted) + b
        assert torch.equal(y.double(), wanted), n


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("out", [48, 30])
def test_product_that_quantizes_its_result(features: Any, fixed: bool, out: int) -> None:
    torch.manual_seed(0)
    run, plan = product(frozenset(features), gemm.Product(20, out, activation="silu", sink=rows.Sink(fixed=fixed)))
    w, b, step, zero = torch.randn(out, 20), torch.randn(out), 0.05, 40
    for n in ROWS:
        x, y, steps = torch.randn(n, 20), poisoned(n, rows.Sink.width(out), dtype=torch.uint8), poisoned(n)
        given = x, gemm.pack(w, plan), gemm.pack_channels(b, plan)
        run(*given, torch.tensor([1 / step, zero]), y) if fixed else run(*given, y, steps)
        wanted = F.silu(F.linear(x.double(), w.double(), b.double()))
        grid = torch.full((n,), step) if fixed else steps
        assert fixed or torch.allclose(steps, (wanted.abs().amax(1) / 127).float(), rtol=1e-5)
        codes = (wanted / grid[:, None] + (zero if fixed else 128)).clamp(0, 255)
        assert (y[:, :out].double() - codes).abs().max() < 0.501, n


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize(("width", "out", "group"), [(64, 48, 32), (100, 33, 32), (37, 70, 16), (40, 100, 40)])
def test_product_with_weights_of_4_bits(features: Any, width: int, out: int, group: int) -> None:
    """One row, some, and a block: codes alone and decoded panels; a short last group, an odd width."""
    torch.manual_seed(0)
    plan = gemm.Plan.of(features, out)
    run = compiled(nbits.Grouped(width, out, activation="relu", residual=True, group=group).build(plan, "main"), features)
    codes, groups = torch.randint(0, 16, (out, width)), -(-width // group)
    scale, zero, b = torch.rand(out, groups), torch.rand(out, groups) * 15, torch.randn(out)
    w = (codes - zero.double().repeat_interleave(group, 1)[:, :width]) * scale.repeat_interleave(group, 1)[:, :width]
    packed = nbits.pack_groups(codes, scale, zero, plan)
    for n in ROWS:
        x, r, y = torch.randn(n, width), torch.randn(n, out), poisoned(n, out)
        run(x, *packed, gemm.pack_channels(b, plan), r, y)
        assert worst(y, F.relu(F.linear(x.double(), w, b.double())) + r) < 2e-6, n


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
def test_product_of_two_activations(features: Any, shared: tuple[bool, bool]) -> None:
    """Fewer rows than a tile, fewer columns than a vector; whole panels, panels of a vector, the last of which goes back."""
    torch.manual_seed(0)
    run = compiled(Batched(*shared).build(gemm.Plan.of(features, 0), "main"), features)
    for b, m, k, n in [(2, 1, 5, 3), (3, 7, 4, 16), (2, 8, 33, 48), (1, 19, 20, 101), (2, 9, 1, 65), (2, 3, 6, 17)]:
        x, y = torch.randn(1 if shared[0] else b, m, k), torch.randn(1 if shared[1] else b, k, n)
        z = poisoned(b, m, n)
        run(x, y, z)
        assert worst(z, x.double() @ y.double()) < 1e-6, (b, m, k, n)


# -- images --------------------------------------------------------------------------------------------------------------


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "dilation"),
    [(20, (3, 3), (1, 1), (1, 1), (1, 1)), (5, (4, 2), (2, 1), (0, 1), (1, 2)), (100, (1, 7), (1, 2), (0, 3), (1, 1)), (48, (3, 3), (2, 2), (2, 2), (2, 2))],
)
def test_depthwise_convolution(features: Any, channels: int, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    """Images of one place, without a tile inside, with whole tiles, with one that goes back; a short vector of channels."""
    torch.manual_seed(0)
    what = Window("product", channels, kernel, stride, padding, dilation, bias=True, activation="hard_swish")
    run = compiled(what.build(gemm.lanes_of(features), "main"), features)
    w, b = torch.randn(channels, 1, *kernel), torch.randn(channels)
    for n, h, width in [(2, 4, 3), (1, 5, 8), (2, 7, 14), (1, 4, 21)]:
        x = torch.randn(n, channels, h, width)
        wanted = F.hardswish(F.conv2d(x.double(), w.double(), b.double(), stride, padding, dilation, channels))
        y = poisoned(*last(wanted).shape)
        run(last(x), w[:, 0].permute(1, 2, 0).contiguous(), b, y)
        assert worst(y, last(wanted)) < 1e-6, (n, h, width)


@pytest.mark.parametrize("features", CPUS)
def test_pools(features: Any) -> None:
    torch.manual_seed(0)
    lanes, channels = gemm.lanes_of(features), 37
    maximum = compiled(Window("maximum", channels, (3, 2), (2, 1), (1, 1), (1, 2)).build(lanes, "main"), features)
    mean = compiled(Window("mean", channels, (2, 3), (2, 3)).build(lanes, "main"), features)
    whole = compiled(Window("mean", channels, None).build(lanes, "main"), features)
    for n, h, width in [(2, 4, 3), (1, 6, 20)]:
        x = torch.randn(n, channels, h, width) - 5
        for run, wanted in (
            (maximum, F.max_pool2d(x, (3, 2), (2, 1), (1, 1), (1, 2))),
            (mean, F.avg_pool2d(x.double(), (2, 3))),
            (whole, x.double().mean((2, 3), keepdim=True)),
        ):
            y = poisoned(*last(wanted).shape)
            run(last(x), y)
            assert worst(y, last(wanted)) < (1e-6 if run is not maximum else 1e-30)


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize(
    ("channels", "out", "kernel", "stride", "dilation", "groups"),
    [
        (3, 20, (3, 2), (2, 1), (1, 1), 1),  # columns and channels of a window are one run
        (20, 48, (2, 3), (1, 2), (2, 2), 1),  # and are not
        (32, 64, (3, 3), (1, 1), (1, 1), 8),  # a panel reads two groups, or one
        (40, 40, (1, 3), (1, 1), (1, 1), 10),  # the last panel begins too late
        (6, 96, (2, 2), (2, 2), (1, 1), 2),  # several panels a group
    ],
)
def test_convolution(features: Any, channels: int, out: int, kernel: Any, stride: Any, dilation: Any, groups: int) -> None:
    """Fewer places than a tile, tiles that go over the ends of rows and images; an addition and an activation behind it."""
    torch.manual_seed(0)
    found = plan_of(features, channels, out, groups)
    assert found is not None
    plan, read = found
    what = Convolution(
        read * kernel[0] * kernel[1], out, activation="relu6", residual=True, after="relu",
        channels=channels, kernel=kernel, stride=stride, dilation=dilation, groups=groups,
    )  # fmt: skip
    run = compiled(what.build(plan, "main"), features)
    w, b = torch.randn(out, channels // groups, *kernel), torch.randn(out)
    for n, h, width in [(1, 3, 5), (3, 4, 5), (2, 9, 16)]:
        x = torch.randn(n, channels, h, width)
        wanted = last(F.relu6(F.conv2d(x.double(), w.double(), b.double(), stride, 0, dilation, groups)))
        r, y = torch.randn(wanted.shape[:-1].numel(), out), poisoned(wanted.shape[:-1].numel(), out)
        behind = torch.cat([last(x).flatten(), poisoned(64)])[:-64].view(last(x).shape)  # nobody reads there, not even times 0
        run(behind, pack_windows(w, what, plan), gemm.pack_channels(b, plan), r, y)
        assert worst(y, F.relu(wanted.flatten(0, 2) + r)) < 1e-6, (n, h, width)


def test_groups_that_panels_would_cut_have_no_plan() -> None:
    assert plan_of(cpu_features(), 15, 15, 3) is None
    assert plan_of(cpu_features(), 12, 12, 6) is None  # a panel would read more channels than there are


@pytest.mark.parametrize("channels", [3, 20])
def test_layouts(channels: int) -> None:
    features = cpu_features()
    x = torch.randn(2, channels, 4, 5)
    for first in (True, False):
        run = compiled(Padded(channels, (2, 1), first).build(gemm.lanes_of(features), "main"), features)
        y = poisoned(2, 8, 7, channels)
        run(x if first else last(x), y)
        assert torch.equal(y, last(F.pad(x, (1, 1, 2, 2))))
    turn = compiled(ChannelsFirst(channels).build("main"), features)
    for places in (5, 64, 65, 130):
        x, y = torch.randn(2, places, channels), poisoned(2, channels, places)
        turn(x, y)
        assert torch.equal(y, x.transpose(1, 2))


# -- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize("width", [1, 7, 16, 100, 384])
def test_quantized_rows(features: Any, width: int) -> None:
    """As the ops' meaning rounds, half to even, and a step of 1 for a row of zeros."""
    torch.manual_seed(0)
    lanes = gemm.Plan.of(features, 1).lanes
    run = compiled(rows.quantize(width, rows.Sink(7), lanes, "main"), features)
    x = torch.randn(9, width) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    x[:, 0] = 7 * torch.tensor([1, 2, 4, 8, 0, 2, 1, 4, 16.0])
    x = x.clamp(-x[:, :1], x[:, :1])
    x[0] = (x[0] * 2).round() / 2  # halves of a step
    codes, steps = poisoned(9, rows.Sink.width(width), dtype=torch.uint8), poisoned(9)
    run(x, codes, steps)
    wanted = torch.where(x.abs().amax(1) == 0, 1.0, x.abs().amax(1) / 7)
    assert torch.equal(steps, wanted)
    assert torch.equal(codes[:, :width].int() - 128, torch.round(x / steps[:, None]).int())
    assert (codes[:, width:] == 0).all()


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize("width", [7, 33, 100, 384])
@pytest.mark.parametrize("centred", [True, False])
def test_norm_with_a_sum_and_codes(features: Any, width: int, centred: bool) -> None:
    torch.manual_seed(0)
    lanes = gemm.Plan.of(features, 1).lanes
    what = rows.Norm(width, 1e-3, centred=centred, residual=True, bias=centred, keep_sum=True, sink=rows.Sink())
    run = compiled(what.build(lanes, "main"), features)
    x, r = torch.randn(2, 5, width) + 3
    w, b = torch.randn(2, width)
    y, h, codes, steps = poisoned(5, width), poisoned(5, width), poisoned(5, rows.Sink.width(width), dtype=torch.uint8), poisoned(5)
    run(x, r, w, *([b] if centred else []), y, h, codes, steps)
    total = x.double() + r
    wanted = F.layer_norm(total, (width,), w.double(), b.double(), 1e-3) if centred else F.rms_norm(total, (width,), w.double(), 1e-3)
    assert torch.equal(h, x + r)
    assert worst(y, wanted) < 2e-6
    assert (steps[:, None] * (codes[:, :width].double() - 128) - y).abs().max() <= 0.5001 * steps.max()


# -- attention -----------------------------------------------------------------------------------------------------------

CASES: list[Any] = list(importlib.import_module("rewright.ir.ops.attention").cases(torch.float32, "cpu"))


@pytest.mark.parametrize("features", CPUS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_attention(features: Any, number: int) -> None:
    if features == AVX2 and number not in (1, 4, 7):
        pytest.skip("the widths differ in nothing else")
    torch.manual_seed(number)
    q, k, v, key_mask, causal, window, scale, softcap, bias, sizes = (*CASES[number], None)[:10]
    what = Attention(
        q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.shape[3] ** -0.5 if scale is None else scale, True,
        key_mask=key_mask is not None, sizes=sizes is not None, causal=causal, window=window, softcap=softcap,
        bias=None if bias is None else tuple(s > 1 for s in bias.shape),
    )  # fmt: skip
    y = poisoned(*q.shape[:3], v.shape[3])
    compiled(what.build(gemm.Plan.of(features, 1).lanes, "main"), features)(q, k, v, *(t for t in (key_mask, sizes, bias) if t is not None), y)
    wanted = torch.ops.rewright.attention(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in CASES[number]))
    assert worst(y, wanted) < 1e-6


def test_attention_of_packed_heads_quantizes_its_result() -> None:
    """q, k and v are parts of one projection; a head of 80 values is no whole number of tiles."""
    torch.manual_seed(0)
    b, n, heads, dim, step, zero = 2, 19, 3, 20, 0.02, 100
    packed, mask = torch.randn(b, n, 3 * heads * dim + 5), torch.rand(b, n) < 0.7
    mask[:, 0] = True
    what = Attention(heads, heads, dim, dim, 0.3, False, (185,) * 3, (5, 65, 125), key_mask=True, sink=rows.Sink(fixed=True))
    y = poisoned(b * n, heads * dim, dtype=torch.uint8)
    compiled(what.build(16 if "avx512f" in cpu_features() else 8, "main"), cpu_features())(packed, packed, packed, mask, torch.tensor([1 / step, zero]), y)
    q, k, v = packed[..., 5:].double().split(heads * dim, -1)
    wanted = torch.ops.rewright.multi_head_attention(q, k, v, heads, heads, mask, False, None, 0.3).flatten(0, 1)
    assert (y.double() - (wanted / step + zero).clamp(0, 255)).abs().max() < 0.501
