"""Example inputs of the architectures: seeded, of any batch and size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
MakeInputs = Callable[[nn.Module, int, int], Inputs]
"""(model, batch, size) -> keyword arguments of forward; size is the sequence length or the image's side."""


def _ids(b: int, s: int, vocabulary: int = 100) -> Tensor:
    return torch.randint(3, vocabulary, (b, s), generator=torch.Generator().manual_seed(b * 1000 + s))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _padded(b: int, s: int) -> Tensor:
    """A mask in which the first row is two tokens shorter."""
    mask = torch.ones(b, s, dtype=torch.long)
    mask[0, s - 2 :] = 0
    return mask


def tokens(model: nn.Module, b: int, s: int) -> Inputs:
    """Token ids with a padding mask."""
    return {"input_ids": _ids(b, s), "attention_mask": _padded(b, s)}


def bare_tokens(model: nn.Module, b: int, s: int) -> Inputs:
    """Token ids alone."""
    return {"input_ids": _ids(b, s)}


def translation(model: nn.Module, b: int, s: int) -> Inputs:
    """A source text with a padding mask and the beginning of its translation."""
    return {**tokens(model, b, s), "decoder_input_ids": _ids(b, s // 2 + 2)}


def image(model: nn.Module, b: int, size: int) -> Inputs:
    """An image for transformers."""
    return {"pixel_values": _floats(b, 3, size, size)}


def plain_image(model: nn.Module, b: int, size: int) -> Inputs:
    """An image for timm."""
    return {"x": _floats(b, 3, size, size)}


def wide_image(model: nn.Module, b: int, size: int) -> Inputs:
    """An image that is twice as wide as high."""
    return {"pixel_values": _floats(b, 3, size, 2 * size)}


def waveform(model: nn.Module, b: int, size: int) -> Inputs:
    """Sound samples."""
    return {"input_values": _floats(b, 400 + 80 * size)}


def spectrogram(model: nn.Module, b: int, size: int) -> Inputs:
    """80 mel bands by 60 frames, the fixed length of these Whispers."""
    return {"input_features": _floats(b, 80, 60)}


def speech_and_text(model: nn.Module, b: int, s: int) -> Inputs:
    """A spectrogram and the beginning of its transcript."""
    return {**spectrogram(model, b, s), "decoder_input_ids": _ids(b, s)}


def image_and_text(model: nn.Module, b: int, s: int) -> Inputs:
    """An image and a text about it."""
    return {**tokens(model, b, s), **image(model, b, 32)}


def image_in_text(model: nn.Module, b: int, s: int) -> Inputs:
    """A text in which 16 image tokens (id 99) stand for the patches of its image."""
    ids = _ids(b, s + 18, 90)
    ids[:, 1:17] = 99
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _floats(b, 3, 16, 16)}


def embeddings(model: nn.Module, b: int, s: int) -> Inputs:
    """What a language model of a vision-language model reads: embedded tokens and image patches."""
    return {"inputs_embeds": _floats(b, s, 32), "attention_mask": _padded(b, s)}


def patches(model: nn.Module, b: int, size: int) -> Inputs:
    """Flattened patches of `b` images of 4 x 4 and 4 x 6 patches in turn, with what the tower would read off their sizes:
    transformers computes both before an export, for they decide shapes."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    grid = torch.tensor([[1, 4, 4 + i % 2 * 2] for i in range(b)])
    before = {"position_ids": get_vision_position_ids(grid, model.spatial_merge_size), "cu_seqlens": get_vision_cu_seqlens(grid)}  # type: ignore[arg-type]
    return {"hidden_states": _floats(int(grid.prod(1).sum()), 3 * 2 * 4 * 4), "grid_thw": grid, **before}


def noisy_latent(model: nn.Module, b: int, size: int) -> Inputs:
    """A latent image at some time steps, and an embedded prompt of 7 tokens."""
    return {"sample": _floats(b, 4, size, size), "timestep": torch.arange(1, b + 1) * 100, "encoder_hidden_states": _floats(b, 7, 32)}


def class_latent(model: nn.Module, b: int, size: int) -> Inputs:
    """A latent image at some time steps, and a class for each."""
    return {"hidden_states": _floats(b, 4, 16, 16), "timestep": torch.arange(1, b + 1) * 100, "class_labels": torch.arange(1, b + 1)}


def prompted_latent(model: nn.Module, b: int, size: int) -> Inputs:
    """A latent image at some time steps, and an embedded prompt as tokens and as one vector."""
    prompt = {"encoder_hidden_states": _floats(b, 7, 32), "pooled_projections": _floats(b, 64)}
    return {"hidden_states": _floats(b, 4, 16, 16), "timestep": torch.arange(1, b + 1) * 100.0, **prompt}


def sample_image(model: nn.Module, b: int, size: int) -> Inputs:
    """An image for an autoencoder."""
    return {"sample": _floats(b, 3, size, size)}


def features(model: nn.Module, b: int, s: int) -> Inputs:
    """A sequence of 32-wide vectors."""
    return {"src": _floats(b, s, 32)}
