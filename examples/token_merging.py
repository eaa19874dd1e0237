"""Half of a vision transformer's FLOPs by merging tokens that are alike: accuracy, agreement and latency of the result."""

from pathlib import Path
from tempfile import TemporaryDirectory

import rewright as rw
from rewright.backends.onnx.session import Session
from rewright.tools.bench import alternate
from rewright.tools.models import load_model
from rewright.tools.zoo import load_zoo

model = load_model("zoo:digits-vit")
result = rw.optimize(model, recipe="vit-2x")
print(result.graph.notes[-1])

with TemporaryDirectory() as folder:
    rw.optimize(model, recipe="clean").export(Path(folder) / "original.onnx")
    result.export(Path(folder) / "merged.onnx")
    original, merged = Session(Path(folder) / "original.onnx"), Session(Path(folder) / "merged.onnx")
    for score in load_zoo("digits-vit").judge(merged, 599):
        print(f"{score.name}: {score.value:.4f} ({score.low:.4f} to {score.high:.4f})")
    images = model.inputs[0]
    times = alternate({"original": lambda: original(images), "merged": lambda: merged(images)}, "original", 31)
print(f"{len(images[0])} images in onnxruntime: {times['merged'].ratio:.2f} of the original's time")
