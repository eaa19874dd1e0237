"""Real architectures with random weights, and inputs, whose tokens are alike in pairs: merging pairs must then change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.tools.torchvision_stand_in import torchvision_stand_in


def twin_images(size: int, patch: int, batch: int = 2) -> Tensor:
    """Images [batch, 3, size, size], float64, in which every second patch of a row is that before it."""
    side = size // patch
    x = torch.randn(batch, 3, side, patch, side, patch, dtype=torch.float64)
    x[..., 1::2, :] = x[..., 0::2, :]
    return x.reshape(batch, 3, size, size)


def pair(positions: Tensor, first: int) -> None:
    """Make each second row of a table [.., tokens, channels] from `first` on that before it."""
    positions.data[..., first + 1 :: 2, :] = positions.data[..., first:-1:2, :] if (positions.shape[-2] - first) % 2 else positions.data[..., first::2, :]


def timm_vit(name: str, first: int, **options: Any) -> nn.Module:
    """A model of timm with random weights that all matter, and positions in pairs from `first` on."""
    with torchvision_stand_in():
        timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, **{"num_classes": 10, "depth": 3, **options})
    for p in model.parameters():  # timm starts class tokens and positions near zero, where a forgotten one would not show
        if p.dim() != 2:
            p.data.add_(torch.randn_like(p) * 0.1)
    if model.pos_embed is not None:
        pair(model.pos_embed, first)
    return model


def vit() -> tuple[nn.Module, tuple]:
    return timm_vit("vit_tiny_patch16_224", 1, img_size=64), (twin_images(64, 16),)


def mean_pooled_vit() -> tuple[nn.Module, tuple]:
    return timm_vit("vit_tiny_patch16_224", 1, img_size=64, global_pool="avg"), (twin_images(64, 16),)


def deit_with_distillation_token() -> tuple[nn.Module, tuple]:
    return timm_vit("deit_tiny_distilled_patch16_224", 2, img_size=64), (twin_images(64, 16),)


def dinov2_with_registers() -> tuple[nn.Module, tuple]:
    return timm_vit("vit_small_patch14_reg4_dinov2", 0, img_size=56), (twin_images(56, 14),)


def dinov2_of_transformers() -> tuple[nn.Module, tuple]:
    """Its output holds all tokens."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
    model = Dinov2WithRegistersModel(config)
    nn.init.normal_(model.embeddings.register_tokens)
    pair(model.embeddings.position_embeddings, 1)
    return model, (twin_images(56, 14),)


def siglip_with_attention_pooling() -> tuple[nn.Module, tuple]:
    return timm_vit("vit_base_patch16_siglip_224", 0, img_size=64, num_classes=0), (twin_images(64, 16),)


class Dense(nn.Module):
    """A convolution over the grid of a ViT's tokens: a segmentation head."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.vit, self.head = timm_vit("vit_tiny_patch16_224", 1, img_size=size, num_classes=0), nn.Conv2d(192, 5, 3, padding=1)
        self.side = size // 16

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.vit.forward_features(x)[:, 1:].transpose(1, 2).reshape(-1, 192, self.side, self.side))


def dense_head() -> tuple[nn.Module, tuple]:
    return Dense(), (twin_images(64, 16),)


def rope_encoder() -> tuple[nn.Module, tuple]:
    """EVA-02: the patches are rotated, the class token is not; its angles are a table."""
    model = timm_vit("eva02_tiny_patch14_224", 1, img_size=56)
    for table in model.rope.buffers():
        if table.dim() == 2:
            pair(table, 0)
    return model, (twin_images(56, 14),)


class Taps(nn.Module):
    """The grid of tokens behind every block, as DPT and FPN heads take it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit("vit_tiny_patch16_224", 1, img_size=64)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.vit._pos_embed(self.vit.patch_embed(x)), []  # type: ignore[operator]
        for block in self.vit.blocks:  # type: ignore[union-attr]
            x = block(x)
            found.append(x[:, 1:].transpose(1, 2).reshape(-1, 192, 4, 4))
        return found


def feature_taps() -> tuple[nn.Module, tuple]:
    return Taps(), (twin_images(64, 16),)


def encoder_decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """BART, whose decoder reads the encoder's tokens."""
    from transformers import BartConfig, BartModel

    sizes = {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 48, "vocab_size": 100}
    model = BartModel(BartConfig(encoder_ffn_dim=96, decoder_ffn_dim=96, use_cache=False, **sizes))
    pair(model.encoder.embed_positions.weight, 2)  # its first two rows are for nothing
    return model, {"input_ids": torch.randint(4, 100, (2, 8)).repeat_interleave(2, 1), "decoder_input_ids": torch.randint(4, 100, (2, 5))}


class Pooled(nn.Module):
    """BERT with its class token's state and the mean over real tokens, as sentence encoders take it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=100))
        table = self.bert.embeddings.position_embeddings.weight
        pair(table, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).expand(hidden.size()).to(hidden.dtype)
        return hidden[:, 0], (hidden * real).sum(1) / real.sum(1).clamp(min=1e-9)


def padded_text() -> tuple[nn.Module, dict[str, Tensor]]:
    """17 tokens of which the second text has 13, a class token and 6 pairs."""
    ids, mask = torch.randint(100, (2, 17)), torch.ones(2, 17, dtype=torch.long)
    ids[:, 2::2] = ids[:, 1::2]
    mask[1, 13:] = 0
    return Pooled(), {"input_ids": ids, "attention_mask": mask}


ARCHITECTURES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int, int]] = {
    "vit": (vit, 1, 8),
    "mean-pooled vit": (mean_pooled_vit, 1, 8),
    "deit": (deit_with_distillation_token, 2, 8),
    "dinov2 with registers": (dinov2_with_registers, 5, 8),
    "dinov2 of transformers": (dinov2_of_transformers, 5, 8),
    "siglip": (siglip_with_attention_pooling, 0, 8),
    "dense head": (dense_head, 1, 8),
    "feature taps": (feature_taps, 1, 8),
    "rope": (rope_encoder, 1, 8),
    "encoder-decoder": (encoder_decoder, 0, 8),
    "padded text": (padded_text, 1, 8),
}
"""Name -> (model and inputs, its tokens in front that are no content, its pairs)."""
