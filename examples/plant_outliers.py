"""Outliers planted into a trained model by an exact inverse migration, what 8 bits make of it, and how outlier-migration takes them out again."""

import sys

import torch

import rewright as rw
from rewright.ir.blocks.edges import edges
from rewright.ir.graph import Graph
from rewright.passes.outliers.migrate import migrate, road
from rewright.tools.models import load_model


def plant(graph: Graph, channels: int = 4, scale: float = 30.0, shift: float = 20.0) -> int:
    """The same few channels behind every norm, `scale` times as large and, where the norm has a bias, `shift` off. Returns how many norms."""
    count = 0
    for edge in edges(graph):
        way = road(edge, "restore")
        if edge.site != "norm-linear" or isinstance(way.scale, str):  # a sentence why not: a tied weight
            continue
        width = edge.value.meta["val"].shape[-1]
        chosen = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:channels]
        s, z = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        s[chosen], z[chosen] = 1 / scale, -shift / scale
        migrate(graph, edge, s, None if isinstance(way.shift, str) else z, "restore")
        count += 1
    graph.clean()
    return count


name = sys.argv[1] if len(sys.argv) > 1 else "zoo:digits-vit"
model = load_model(name)
*fit, held_out = [tuple(x[:, :128] for x in flat) for flat in model.inputs[1:6]]
graph = rw.optimize(model, recipe=[], verify=False).graph
want = graph.run(held_out)[0]
planted = graph.clone()
count = plant(planted)

migration, w8a8 = rw.passes.OutlierMigration(activations="int8-dynamic"), rw.passes.QuantizeLinear(tied="copy")
print(f"{name}: outliers behind {count} norms; drift (1 - cosine of the outputs) on held-out data")
for what, start, recipe in (
    ("as trained, W8A8", graph, [w8a8]),
    ("planted, float", planted, []),
    ("planted, W8A8", planted, [w8a8]),
    ("planted, outlier-migration, W8A8", planted, [migration, w8a8]),
):
    result = rw.optimize(start, held_out, recipe=recipe, calibration=fit, verify=False)
    cosine = torch.nn.functional.cosine_similarity(result.graph.run(held_out)[0].double(), want.double(), dim=-1).mean()
    print(f"  {what:34} {1 - cosine:.1e}")
