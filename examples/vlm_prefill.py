"""Prefill of a LLaVA (small, random weights, nothing to download) with fewer image tokens: captured, pruned, timed. Argument: a method."""

import sys
import time

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import rewright as rw
from rewright.ir.cost import cost
from rewright.passes.tokens.visual_token_pruning import VisualTokenPruning

SYSTEM, IMAGE, TEXT = 35, 576, 29


class Prefill(torch.nn.Module):
    """Prompts of one length in, the last token's logits out. For decoding, return past_key_values' keys and values too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values):
        return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False, logits_to_keep=1).logits


vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 336, "patch_size": 14}
text = {"hidden_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 1408, "vocab_size": 1000}
config = LlavaConfig(vision_config={**vision, "model_type": "clip_vision_model"}, text_config={**text, "model_type": "llama"}, image_token_index=999)
model = LlavaForConditionalGeneration(config).eval()

ids = torch.randint(0, 990, (1, SYSTEM + IMAGE + TEXT))
ids[:, SYSTEM : SYSTEM + IMAGE] = 999
example = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
graph = rw.capture(Prefill(model), kwargs=example, dynamic_shapes={})
result = rw.optimize(graph, example, recipe=[VisualTokenPruning(method=sys.argv[1] if len(sys.argv) > 1 else "balanced")])
print(result.graph.notes[-1])


def milliseconds(graph):
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        graph(**example)
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


before, after = result.outcome.original, result.graph
with torch.no_grad():
    less, speed = cost(before).flops / cost(after).flops, f"{milliseconds(before):.0f} -> {milliseconds(after):.0f} ms"
print(f"{less:.2f} times less FLOPs; prefill of {ids.shape[1]} tokens {speed}")
