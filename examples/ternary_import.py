"""A ternary network trained the BitNet way on handwritten digits, imported: the same answers, a fifteenth of the bytes, sums instead of products."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rewright as rw
from rewright.backends.onnx.session import Session
from rewright.ir.energy import CAPTION, energy, total
from rewright.tools.bench import alternate


class BitLinear(nn.Linear):
    """RMSNorm, 8 bits a token, weights of -g, 0 and g; gradients pass straight through both roundings."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.norm = nn.RMSNorm(inputs, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x, w = self.norm(x), self.weight
        s, g = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5), w.abs().mean().clamp(min=1e-5)
        x = x + ((x * s).round().clamp(-128, 127) / s - x).detach()
        w = w + ((w / g).round().clamp(-1, 1) * g - w).detach()
        return F.linear(x, w, self.bias)


torch.manual_seed(0)
torch.set_num_threads(1)
data = load_digits()
x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
order = torch.randperm(len(x))
x, y = x[order], y[order]
model = nn.Sequential(BitLinear(64, 1024), nn.ReLU(), BitLinear(1024, 1024), nn.ReLU(), BitLinear(1024, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(400):
    rows = torch.randint(0, 1200, (64,))
    loss = F.cross_entropy(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval().requires_grad_(False)
held_out, labels = x[1200:], y[1200:]

float_form = rw.optimize(model, (held_out[:128],), recipe=[])
ternary_form = rw.optimize(model, (held_out[:128],), recipe=[rw.passes.TernaryImport(min_weights=1)])
for name, run in (("trained", model), ("imported", ternary_form.module)):
    print(f"{name}: {(run(held_out).argmax(-1) == labels).float().mean():.4f} of {len(labels)} held-out digits")
before, after = float_form.graph, ternary_form.graph
print(f"{len(ternary_form.records[-1].layers)} layers imported, weights {before.weight_bytes():,} -> {after.weight_bytes():,} bytes")
for what in ("total", "multiplications"):
    a, b = (getattr(total(energy(g)), what) / 1e6 for g in (before, after))
    print(f"modelled energy of 128 digits, {what}: {a:.0f} -> {b:.1f} uJ")
print(CAPTION)

with TemporaryDirectory() as folder:
    old, new = (r.export(Path(folder) / f"{i}.onnx") for i, r in enumerate((float_form, ternary_form)))
    print(f"files {old.bytes:,} -> {new.bytes:,} bytes")
    original, imported = Session(old.path), Session(new.path)
    for rows in (held_out[:1], held_out[:128]):
        times = alternate({"original": lambda r=rows: original((r,)), "imported": lambda r=rows: imported((r,))}, "original", 31)
        ms, ratio = (times[name].median_ms for name in ("original", "imported")), times["imported"].ratio
        print(f"{len(rows)} digits in onnxruntime, one thread: {' -> '.join(f'{t:.3f}' for t in ms)} ms, ratio {ratio:.2f}")
