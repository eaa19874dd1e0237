"""A pass of your own: relu(x) * relu(x) -> square of one relu. Found, explained, verified, and undone when it is wrong."""

import torch

import rewright as rw
from rewright.passes.rewrite import Rewrite


class SquareRelu(Rewrite):
    """Before: relu(x) * relu(x)     After: square(relu(x))"""

    name = "square-relu"

    def pattern(self, op, x):
        return op.mul(op.relu(x), op.relu(x))

    def why_not(self, m):
        return None if m.x.meta["val"].is_floating_point() else "x holds integers"

    def rewrite(self, op, m):
        return op.square(op.relu(m.x))


class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * torch.relu(x) + 1


result = rw.optimize(Model(), torch.randn(4, 8), recipe=[SquareRelu()])
record = result.records[-1]
print(f"{record.name}: matched {record.matched}, applied {record.applied}, bit-equal: {record.measured['bit_equal']}")
