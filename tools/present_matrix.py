"""How the capture matrix looks to a person: a row an architecture, the sentences of what failed, the counts."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .matrix import COLUMNS, Row, counts, payload

LEGEND = (
    "captured: one torch.export trace against eager, at three shapes, batch 1 among them; canonical: the canonical form against eager; saved, exported, "
    "re-exported: the same after save and load, in onnxruntime (opset in brackets where it is not 20), from a new .pt2; gradients: those of every parameter; "
    "blocks: attention + feed-forward blocks found as the config declares them. exact: bit-equal; a number: largest error relative to the largest value."
)


def show(rows: Sequence[Row], console: Console) -> None:
    """The table on a console."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("architecture", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("parameters", justify="right")
    for column in (*COLUMNS, "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(c.said, style="red" if c.ok is False else "") for c in row.cells.values()]
        table.add_row(row.name, row.family, f"{row.parameters:,}", *cells, f"{row.seconds:.1f}")
    table.add_section()
    table.add_row("passed", "", "", *counts(rows).values(), f"{sum(r.seconds for r in rows):.0f}")
    console.print(table)
    for row in rows:
        for sentence in row.sentences:
            console.print(f"{row.name}: {sentence}", markup=False, soft_wrap=True)
    console.print(LEGEND, markup=False, soft_wrap=True)


def text(rows: Sequence[Row]) -> str:
    """The same as plain text, with the versions it holds for."""
    file = io.StringIO()
    console = Console(file=file, width=200, highlight=False)
    show(rows, console)
    held = payload(rows)
    console.print(", ".join(f"{k} {v}" for k, v in held["versions"].items() if v) + f"; {held['machine']}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
