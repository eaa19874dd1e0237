"""An ONNX file in, smaller and faster ONNX files out: cleaned, quantized, with half of its tokens merged. Argument: the file, default MiniLM by torch."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch

import rewright as rw
from rewright.backends.onnx.session import Session
from rewright.tools.bench import alternate
from rewright.tools.zoo import load_zoo

zoo = load_zoo("minilm")
with TemporaryDirectory() as folder:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/minilm.onnx")
    if not file.exists():  # as people have it: exported by torch
        dims = {name: {0: "batch", 1: "sequence"} for name in zoo.example}
        torch.onnx.export(zoo.module, (), file, kwargs=dict(zoo.example), dynamo=True, dynamic_shapes=dims, external_data=False, verbose=False)
    makes = {
        "clean-onnx": lambda: rw.optimize(file, recipe="clean-onnx"),
        "encoder-int8": lambda: rw.optimize(file, recipe="encoder-int8", calibration=zoo.calibration),
        "encoder-half-tokens": lambda: rw.optimize(file, recipe="encoder-half-tokens", calibration=zoo.calibration, sizes={"sequence": 128}),
    }
    written = {"the file": file} | {name: make().export(f"{folder}/{name}.onnx").path for name, make in makes.items()}
    ids = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sessions = {name: Session(path) for name, path in written.items()}
    times = alternate({name: lambda s=s: s([batch[n] for n in s.inputs]) for name, s in sessions.items()}, "the file", 11)
    for name, path in written.items():
        print(f"{name}: {len(onnx.load(path).graph.node)} nodes, {path.stat().st_size / 1e6:.1f} MB, {times[name].ratio:.2f} of the time at 8x128")
