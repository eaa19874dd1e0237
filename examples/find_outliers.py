"""Which inputs of a real model's linears have outlier channels: one calibration run, statistics of every edge."""

import sys

import rewright as rw
from rewright.passes.statistics import Calibration, linear_inputs
from rewright.tools.models import load_model

name = sys.argv[1] if len(sys.argv) > 1 else "zoo:minilm"
loaded = load_model(name)
graph = rw.optimize(loaded, recipe=[]).graph
calibration = Calibration(loaded.inputs[1:])
statistics = calibration.gather(graph, linear_inputs(graph, {"absmax", "mean"}))
values = {n.name: n for n in graph.nodes}

found = []
for value in statistics:
    absmax = statistics[value].absmax
    readers = [u.meta["path"] for u in values[value].users if "linear" in str(u.target)]
    found.append((float(absmax.max() / absmax.median()), int(absmax.argmax()), statistics[value].count, readers))
found.sort(reverse=True)
print(f"{name}: {len(found)} edges, {found[0][2]} tokens, {calibration.runs} run; largest over median channel:")
for ratio, channel, _, readers in found[:5]:
    print(f"  {ratio:6.1f}x  channel {channel:<5} into {', '.join(readers)}")
