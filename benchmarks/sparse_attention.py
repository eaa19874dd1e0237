"""minilm on 512-token texts with calibrated block-sparse attention: cosine, density, dropped mass, and time in onnxruntime.

usage: python benchmarks/sparse_attention.py
Writes benchmarks/sparse_attention.txt. Texts of 510 tokens are cut out of the zoo's own calibration texts, one behind the other; patterns are
found on the first 8, judged on the last 8. One thread; time is the ratio to the dense model with packed heads, fully optimised, alternating.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LENGTH = 512
FIRST, LAST = 101, 102  # [CLS], [SEP]
SETTINGS = ((64, 0.9), (64, 0.8), (64, 0.6), (32, 0.7))


def texts(loaded: Any) -> Any:
    """[n, 512] token ids."""
    import torch

    words = [int(i) for flat in loaded.inputs[1:] for row, real in zip(*flat) for i in row[real.bool()][1:-1]]
    each = LENGTH - 2
    return torch.tensor([[FIRST, *words[i * each : (i + 1) * each], LAST] for i in range(len(words) // each)])


def main() -> None:
    import torch

    import rewright as rw
    from rewright.backends.onnx.session import Session
    from rewright.tools.bench import alternate
    from rewright.tools.demo import conditions
    from rewright.tools.models import Loaded, load_model

    torch.set_num_threads(1)
    zoo = load_model("zoo:minilm")
    batches = [(x, torch.ones_like(x)) for x in texts(zoo).split(4)]
    loaded = Loaded("minilm", zoo.graph, [batches[0], *batches], zoo.module)
    held_out = batches[-2:]
    lines = [f"minilm, {LENGTH} tokens. " + ", ".join(f"{k} {v}" for k, v in conditions().items()), ""]
    dense = rw.optimize(loaded, recipe=[rw.passes.FuseAddLayerNorm(), rw.passes.PackHeads()], verify=False)
    asked = rw.optimize(loaded, recipe=[rw.passes.SparseAttention(block=64, mass=0.8, most_density=0.8)], verify=False, target="cpu")
    lines += [f"by default (mass 0.8): {d}" for d in sorted({d.why for d in asked.records[-1].declined})]
    want = [dense.graph.run(b)[0] for b in held_out]
    with TemporaryDirectory() as folder:
        dense.export(path := Path(folder) / "dense.onnx")
        sessions, said = {"dense": Session(path)}, {}
        for block, mass in SETTINGS:
            step = rw.passes.SparseAttention(block=block, mass=mass, most_density=1.0, force=True)
            found = rw.optimize(loaded, recipe=[step, rw.passes.FuseAddLayerNorm()], verify=False)
            got = [found.graph.run(b)[0] for b in held_out]
            cosine = torch.cat([torch.cosine_similarity(a.mean(1), b.mean(1), dim=-1) for a, b in zip(want, got)]).mean()
            row = f"block {block}, mass {mass}"
            note = next(n for n in found.graph.notes if "density" in n).removeprefix("sparse-attention: ")
            said[row] = f"cosine of the mean embedding {cosine:.4f}; {note.replace('encoder.', '').replace('.attention.self', '')}"
            found.export(path := Path(folder) / f"{block}-{mass}.onnx")
            sessions[row] = Session(path)
            print(row, said[row], flush=True)
        for batch in (1, 4):
            flat = tuple(x[:batch] for x in batches[0])
            times = alternate({row: (lambda s=s, flat=flat: s(flat)) for row, s in sessions.items()}, "dense", 11, budget_s=60)
            lines += [f"  {batch}x{LENGTH}  {row:22s} ratio to dense {t.ratio:.3f} [{t.ratio_low:.3f}-{t.ratio_high:.3f}]" for row, t in times.items()]
    lines += ["", *(f"{row}: {text}" for row, text in said.items())]
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
