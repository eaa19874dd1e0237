"""Optimize the real MiniLM for onnxruntime on a CPU, use it from PyTorch, write the ONNX file."""

import sys
import tempfile
from pathlib import Path

import rewright as rw

out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "minilm-int8.onnx"
result = rw.optimize("zoo:minilm", recipe="encoder-int8")
for record in result.records:
    if record.applied:
        print(f"{record.name}: applied {record.applied}, declined {len(record.declined)}, cosine {record.measured['cosine']:.4f}")

exported = result.export(out)
before, after = result.outcome.original.weight_bytes(), result.graph.weight_bytes()
print(f"weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB; onnxruntime agrees with the graph to cosine {exported.parity.cosine:.5f}")
