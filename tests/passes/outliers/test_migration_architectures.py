"""Random migrations of all edges of small models of the usual families leave their function."""

from __future__ import annotations

import pytest
import torch

from rewright.ir.capture import capture
from rewright.ir.errors import UsageError
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context
from rewright.tools.architectures import find_architectures

from .migrations import migrate_all

torch.set_num_threads(1)
pytest.importorskip("transformers")

# name -> edges of two layers: (migrated, shifted) with explicit = "never", "linear", "restore"
NAMES = {
    "bert": ((2, 2), (9, 9), (7, 7)),
    "gpt2": ((6, 6), (8, 8), (6, 6)),
    "llama": ((9, 2), (9, 9), (9, 2)),
    "qwen3": ((9, 2), (9, 9), (9, 2)),
    "gemma2": ((8, 2), (8, 8), (8, 2)),
    "gptneox": ((7, 7), (9, 9), (7, 7)),
    "falcon": ((4, 4), (6, 6), (4, 4)),
    "mixtral": ((9, 2), (9, 5), (9, 2)),
    "whisper_encoder": ((6, 6), (9, 8), (6, 6)),
    "swin": ((13, 13), (17, 17), (13, 13)),
    "timm_vit": ((7, 7), (9, 9), (7, 7)),
}


@pytest.mark.parametrize("name", NAMES)
def test_architectures_keep_their_function(name: str) -> None:
    (architecture,) = find_architectures([name])
    try:
        model = architecture.build()
    except UsageError as error:
        pytest.skip(str(error))
    named = architecture.inputs(model, *architecture.shapes[0])
    graph = capture(model, (), named, architecture.dynamic)
    for p in CANONICAL:
        graph = p().run(graph, Context())
    graph.clean()
    for explicit, expected in zip(("never", "linear", "restore"), NAMES[name]):
        done = migrate_all(graph, named=named, explicit=explicit)
        assert (len(done.done), sum(s for *_, s in done.done)) == expected, explicit
        assert done.error < 1e-5
        assert explicit == "never" or migrate_all(graph, named=named, explicit=explicit, powers=True).bit_equal
