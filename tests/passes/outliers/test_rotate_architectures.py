"""The exact passes on tiny random transformers of the usual families: they apply, and the outputs stay; or they say why not."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from torch import nn

from rewright.ir.capture import capture
from rewright.ir.graph import Flat, Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.outliers.rotate_residual import RotateResidual
from rewright.passes.outliers.rotate_values import RotateValues
from rewright.passes.outliers.sort_channels import SortChannels
from rewright.passes.rewrite import Context

from .rotation_models import edited, error, only

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

NET = 5e-6  # what ir.verify allows at this depth; the largest seen is 5e-7

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
HEADS = {**GROUPED, "head_dim": 12}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 4}
GPT = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": False}
OPT = {**TEXT, "ffn_dim": 96, "word_embed_proj_dim": 48, "tie_word_embeddings": False}
MOE = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = {k: v for k, v in TEXT.items() if k not in ("intermediate_size", "max_position_embeddings")} | {"tie_word_embeddings": False}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}

# model, config, options
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-base": ("LlamaModel", "LlamaConfig", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TEXT, "tie_word_embeddings": False}),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}),
    "bert": ("BertModel", "BertConfig", TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
}
REFUSED = {
    "gemma2": "model.layers.0.self_attn.o_proj writes to the stream, and model.layers.0.post_attention_layernorm stands between it and the sum,"
    " with a weight that differs by channel",
    "olmo2": "model.layers.0.self_attn.o_proj writes to the stream, and model.layers.0.post_attention_layernorm stands between it and the sum,"
    " with a weight that differs by channel",
}


@cache
def _family(name: str) -> tuple[Graph, Flat]:
    model, config, options = FAMILIES[name]
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p) * 0.3) if p.dim() == 1 else p.mul_(3)
    size = options.get("image_size")
    inputs = torch.randn(2, 3, size, size) if isinstance(size, int) else torch.randint(0, 64, (2, 9))
    kwargs = {"use_cache": False} if "ForCausalLM" in model or model in ("LlamaModel", "GPT2LMHeadModel") else {}
    graph = capture(built, (inputs,), kwargs)
    for p in CANONICAL:
        graph = p().run(graph, Context())
    return graph, graph.flat_inputs((inputs,), kwargs)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("bert", "gemma2", "olmo2", "swin")])
def test_the_stream_is_rotated(name: str) -> None:
    graph, flat = _family(name)
    after, log = edited(graph, RotateResidual())
    assert len(log.applied) == 1, log.declined
    assert error(graph, after, flat) <= NET


@pytest.mark.parametrize("name", REFUSED)
def test_the_stream_is_left_alone_in_words(name: str) -> None:
    graph, _ = _family(name)
    assert only(edited(graph, RotateResidual())[1]) == REFUSED[name]


def test_every_sum_of_bert_is_post_norm() -> None:
    _, log = edited(_family("bert")[0], RotateResidual())
    assert [d.why.partition(":")[0] for d in log.declined] == ["post-norm"] * 4


def test_only_the_last_stage_of_swin_keeps_no_mean() -> None:
    graph, flat = _family("swin")
    after, log = edited(graph, RotateResidual())
    assert log.applied == ["swin.encoder.layers.1.blocks.1"]
    (why,) = (d.why for d in log.declined)
    assert why == "swin.encoder.layers.0.downsample reads the stream without a norm, so it would miss the mean that LayerNorm takes away"
    assert error(graph, after, flat) <= NET


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_rotated_and_channels_sorted(name: str) -> None:
    graph, flat = _family(name)
    rotated, log = edited(graph, RotateValues())
    assert len(log.applied) == 2 * (1 + (name == "swin"))
    assert error(graph, rotated, flat) <= NET
    ordered, log = edited(graph, SortChannels(by="norm"))
    assert len(log.applied) == (2 if name == "mixtral" else 8 if name == "swin" else 4)
    assert error(graph, ordered, flat) <= NET
