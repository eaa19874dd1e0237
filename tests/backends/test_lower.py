"""The whole road: capture, an op of ours, kernels put in for a target; values, gradients, torch.compile, and the reasons."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from operator import getitem

import pytest
import torch
from torch import Tensor, nn

from rewright.backends.kernel_ops import kernel_op
from rewright.backends.lower import Lowered, lower
from rewright.backends.table import KERNELS, Kernel, absent
from rewright.backends.target import Target
from rewright.ir.capture import capture
from rewright.ir.graph import Graph

aten = torch.ops.aten

TVM_ABSENT = absent("tvm")
needs_tvm = pytest.mark.skipif(TVM_ABSENT is not None, reason=str(TVM_ABSENT))


class Block(nn.Module):
    """A residual add whose norm is read, and whose sum is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48, eps=1e-3)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return self.norm(h), h


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y, h = self.block(x, r)
        return self.out(y.tanh()) + h[..., :5]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.block.norm.weight)
    nn.init.normal_(net.block.norm.bias)
    return net.eval()


def inputs(*rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*rows, 48, requires_grad=True), torch.randn(*rows, 48, requires_grad=True)


def with_our_op(model: nn.Module, args: tuple[Tensor, ...]) -> Graph:
    """Captured, and the add and its norm replaced by hand with the op the fusion pass would put there."""
    graph = capture(model, tuple(a.detach() for a in args))
    (norm,) = graph.find(aten.layer_norm.default)
    add, _, w, b, eps, *_ = norm.args
    ours = graph.insert(torch.ops.rewright.add_layer_norm.default, *add.args, w, b, eps, before=norm, like=norm)
    norm.replace_all_uses_with(graph.insert(getitem, ours, 0, before=norm))
    add.replace_all_uses_with(graph.insert(getitem, ours, 1, before=norm), delete_user_cb=lambda user: user not in (norm, ours))
    graph.clean()
    return graph


def targets(graph: Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes}


@pytest.fixture
def graph(net: Net) -> Graph:
    graph = with_our_op(net, inputs(3, 4))
    assert "rewright.add_layer_norm.default" in targets(graph)
    return graph


def test_a_cuda_target_gets_triton(graph: Graph) -> None:
    lowered = lower(graph, Target.load("h200"), available=["triton"])
    (choice,) = lowered.choices
    assert (choice.path, choice.op, choice.kernel) == ("block.norm", "add_layer_norm", "triton")
    assert choice.why == "triton's add_layer_norm takes torch.float32 on cuda"
    assert {n.name: str(n.target) for n in lowered.graph.nodes}[choice.node] == "rewright_kernels.add_layer_norm_triton.default"


def test_a_cpu_target_gets_tvm_and_says_why_not_triton(graph: Graph) -> None:
    lowered = lower(graph, Target.load("cpu"), available=["triton", "tvm"])
    (choice,) = lowered.choices
    assert choice.kernel == "tvm"
    assert choice.why == "tvm's add_layer_norm takes torch.float32 on cpu; triton's add_layer_norm runs on cuda, not on cpu"


def test_what_no_kernel_takes_stays_in_torch_and_says_why(graph: Graph) -> None:
    lowered = lower(graph, Target.load("cpu"), available=[])
    (choice,) = lowered.choices
    assert choice.kernel == "torch"
    assert choice.why == "triton's add_layer_norm runs on cuda, not on cpu; tvm is not available"
    assert targets(lowered.graph) == targets(graph)


def test_the_dtype_decides(net: Net) -> None:
    graph = with_our_op(net.bfloat16(), tuple(t.bfloat16() for t in inputs(3, 4)))
    (choice,) = lower(graph, Target.load("cpu"), available=["tvm"]).choices
    assert choice.kernel == "torch"
    assert "tvm's add_layer_norm does not take torch.bfloat16" in choice.why
    assert lower(graph, Target.load("h200"), available=["triton"]).choices[0].kernel == "triton"


def test_by_default_this_machine_is_asked(graph: Graph) -> None:
    (choice,) = lower(graph, Target.load("cpu")).choices
    assert choice.kernel == ("torch" if TVM_ABSENT else "tvm")
    assert (TVM_ABSENT or "") in choice.why


def test_the_graph_given_is_left_as_it_was(graph: Graph) -> None:
    before = targets(graph)
    lower(graph, Target.load("h200"), available=["triton"])
    assert targets(graph) == before


@pytest.fixture(params=[("cpu", "tvm"), ("h200", "triton")], ids=["cpu", "h200"])
def lowered(request: pytest.FixtureRequest, graph: Graph) -> Lowered:
    """For the CPU here, and for a GPU that is not here: there the kernel op computes its meaning."""
    target, backend = request.param
    if target == "cpu" and TVM_ABSENT:
        pytest.skip(TVM_ABSENT)
    lowered = lower(graph, Target.load(target), available=[backend])
    assert lowered.choices[0].kernel == backend
    return lowered


@pytest.mark.filterwarnings("ignore:.*computes in plain torch")
@pytest.mark.parametrize("rows", [(3, 4), (1, 4), (7, 4)], ids=str)
def test_values_and_gradients_stay(net: Net, lowered: Lowered, rows: tuple[int, ...]) -> None:
    check_same(net, lowered.module, inputs(*rows))


@pytest.mark.filterwarnings("ignore:.*computes in plain torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_works(net: Net, lowered: Lowered) -> None:
    torch._dynamo.reset()
    check_same(net, torch.compile(lowered.module, fullgraph=True, dynamic=True), inputs(3, 4))


def check_same(net: Net, module: Callable[..., Tensor], args: tuple[Tensor, Tensor]) -> None:
    """The same output, and the same gradients of inputs and weights."""
    want, got = net(*args), module(*args)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    probe = torch.randn_like(want)
    net.zero_grad()
    leaves = [*args, *net.parameters()]
    for got_grad, want_grad in zip(torch.autograd.grad(got, leaves, probe), torch.autograd.grad(want, leaves, probe), strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=1e-5)


@needs_tvm
def test_an_export_of_the_lowered_module_keeps_the_kernel(graph: Graph) -> None:
    lowered = lower(graph, Target.load("cpu"), available=["tvm"])
    again = torch.export.export(lowered.module, tuple(t.detach() for t in inputs(3, 4)), strict=False).run_decompositions({})
    assert "rewright_kernels.add_layer_norm_tvm.default" in {str(n.target) for n in again.graph.nodes}


# the first compares arguments before and after with what torch lacks for float8
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}-{k.backend}")
@pytest.mark.filterwarnings("ignore:.*computes in plain torch")
def test_kernel_op_keeps_torchs_rules(kernel: Kernel) -> None:
    """Schema, fake tensor (shapes and strides, of a transposed operand too), autograd, AOT dispatch."""
    if kernel.backend == "tvm" and TVM_ABSENT:
        pytest.skip(TVM_ABSENT)
    op = kernel_op(kernel)
    module = importlib.import_module(f"rewright.ir.ops.{kernel.op}")
    for i, args in enumerate(module.cases(torch.float32, "cpu")):
        if i < 2:
            args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_leaf and a.is_floating_point() and a.itemsize > 1 else a for a in args)
            torch.library.opcheck(op, args, test_utils=CHECKS[kernel.op == "linear_fp8" :])


def test_the_fake_of_a_kernel_op_is_dense_like_the_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(6, 4, 48).transpose(0, 1), torch.empty(48)
        for kernel in (k for k in KERNELS if k.op == "add_layer_norm"):
            for out in kernel_op(kernel)(x, x, w, w, 1e-5):
                assert (out.shape, out.is_contiguous()) == ((4, 6, 48), True)


def test_a_kernel_op_away_from_its_device_computes_the_meaning_and_warns() -> None:
    x, r = inputs(2, 3)
    w, b = torch.randn(2, 48)
    (kernel,) = (k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", "triton"))
    with pytest.warns(UserWarning, match="add_layer_norm_triton computes in plain torch: triton's add_layer_norm runs on cuda, not on cpu"):
        got = kernel_op(kernel)(x, r, w, b, 1e-5)
    for g, want in zip(got, torch.ops.rewright.add_layer_norm(x, r, w, b, 1e-5), strict=True):
        assert torch.equal(g, want)


@pytest.mark.filterwarnings("ignore:.*computes in plain torch")
def test_second_derivatives_and_shared_operands() -> None:
    """Through the meaning in float64, with x given twice: each use gets its own gradient."""
    (kernel,) = (k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", "triton"))
    op = kernel_op(kernel)
    x, w, b = (torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True) for shape in ((2,), (), ()))
    assert torch.autograd.gradcheck(lambda x, w, b: op(x, x, w, b, 1e-3), (x, w, b))
    assert torch.autograd.gradgradcheck(lambda x, w, b: op(x, x.sin(), w, b, 1e-3), (x, w, b))


@needs_tvm
def test_a_lowered_module_moved_to_another_dtype_stays_right(net: Net, graph: Graph) -> None:
    module = copy.deepcopy(lower(graph, Target.load("cpu"), available=["tvm"]).module).double()
    args = tuple(t.detach().double() for t in inputs(3, 4))
    with pytest.warns(UserWarning, match="tvm's add_layer_norm does not take torch.float64"):
        got = module(*args)
    torch.testing.assert_close(got, net.double()(*args))
