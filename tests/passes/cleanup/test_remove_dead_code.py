"""What nobody reads goes, weights included."""

from __future__ import annotations

import torch
from torch import nn

from rewright.passes.cleanup.remove_dead_code import RemoveDeadCode


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.idle(x).relu()
        return self.used(x)


def test_drops_calls_and_their_weights(apply) -> None:
    done = apply(_Idle(), (torch.randn(3, 8),))
    aten = torch.ops.aten
    dead = done.graph.insert(aten.relu.default, done.graph.nodes[-1], before=done.graph.output)
    done.graph.insert(aten.exp.default, dead, before=done.graph.output)
    from rewright.passes.rewrite import Context

    context = Context()
    RemoveDeadCode().run(done.graph, context)
    assert done.after == {"linear": 1}
    assert len(context.applied) == 2
    assert sorted(done.graph.module.state_dict()) == ["used.bias", "used.weight"]
    assert done.error(torch.randn(1, 8)) == 0
