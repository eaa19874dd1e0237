"""The training curve of a zoo model as a picture: cards/NAME.jsonl -> cards/NAME.svg."""

from __future__ import annotations

import json
from pathlib import Path

CARDS = Path(__file__).parent / "cards"


def draw(name: str) -> Path:
    """Training and held-out loss against steps (for the language model in nats a token), and accuracy where there is one."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name  # the same curve gives the same file
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (CARDS / f"{name}.jsonl").read_text().splitlines()]
    figure, left = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for key, label, style in (("loss", "training loss", "C0-"), ("held_out_loss", "held-out loss", "C1-")):
        points = [(r["step"], r[key]) for r in rows if r[key] is not None and r["step"]]
        left.plot(*zip(*points), style, label=label)
    left.set_xlabel("step")
    left.set_ylabel("loss, nats")
    left.grid(alpha=0.3)
    lines = left.get_lines()
    if "accuracy" in rows[0]:
        right = left.twinx()
        lines += right.plot([r["step"] for r in rows[1:]], [100 * r["accuracy"] for r in rows[1:]], "C2-", label="held-out accuracy")
        right.set_ylabel("accuracy, %")
    left.legend(handles=lines, loc="center right")
    left.axvline(rows[-1]["step"] * 0.75, color="grey", linewidth=0.8, linestyle=":")
    left.annotate("rate falls", (rows[-1]["step"] * 0.755, left.get_ylim()[1] * 0.8), color="grey", fontsize=8)
    path = CARDS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
