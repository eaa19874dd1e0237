"""zoo:digits-vit: a vision transformer trained on scikit-learn's handwritten digits (8x8, upsampled to 32x32)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..score import Run, Score, mean, proportion
from . import DATA, Batch, Split, ZooModel, drawn, offline

WEIGHTS = DATA / "digits_vit.safetensors"
CALIBRATION = 128  # training images


def untrained() -> nn.Module:
    """The architecture: 6 pre-norm layers of width 192, 3 heads of 64, GELU FFN of 768, 64 patches of 4x4 and a CLS token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=4,
        num_channels=1,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def trained() -> nn.Module:
    """The model with the weights that ship (bfloat16 values, held as float32), in eval mode: a new one every time."""
    with offline():
        model = untrained()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return model.eval()


@cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, labels, held-out images, labels): 1198 and 599 of them, in a fixed mixed order.

    Images are [n, 1, 32, 32] from -1 (paper) to 1 (ink), upsampled bilinearly.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(large), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 3], order[len(order) // 3 :]
    return large[training], labels[training], large[held_out], labels[held_out]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images turned by up to 12 degrees, scaled by up to 12 %, sheared by up to 0.15 and shifted by up to 2.5 pixels."""
    n = len(images)
    angle, log_scale, shear, dx, dy = (2 * torch.rand(5, n, generator=generator) - 1) * torch.tensor([0.21, 0.12, 0.15, 0.16, 0.16])[:, None]
    cos, sin, scale = angle.cos(), angle.sin(), log_scale.exp()
    turn = torch.stack([torch.stack([cos * scale, (shear - sin) * scale, dx], -1), torch.stack([sin * scale, cos * scale, dy], -1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is paper


def load() -> ZooModel:
    """The model with 16 calibration batches of 8 training images, judged by `judge`."""
    batches = [{"pixel_values": x} for x in _labelled("calibration")[0].split(8)]
    example = {"pixel_values": batches[0]["pixel_values"][:2]}
    return ZooModel("digits-vit", trained(), example, batches, judge, 599, _training_batch, lambda: batches)


def _training_batch(step: int, seed: int = 0) -> Batch:
    """64 augmented training digits, none that calibrates."""
    images_, labels, _, _ = images()
    return {"pixel_values": training_images(images_[CALIBRATION:], labels[CALIBRATION:], step, seed)[0]}


def training_images(images: Tensor, labels: Tensor, step: int, seed: int = 0, batch: int = 64) -> tuple[Tensor, Tensor]:
    """That step's augmented images [batch, 1, 32, 32] and their labels."""
    generator = drawn(step, seed)
    chosen = torch.randint(len(images), (batch,), generator=generator)
    return augmented(images[chosen], generator), labels[chosen]


def judge(run: Run, most: int | None = None, split: Split = "held_out") -> list[Score]:
    """Accuracy on the held-out third, its paired change against the original, and agreement with the original's answers."""
    images, labels = (x[:most] for x in _labelled(split))
    answers, original = _answers(run, images), _original_answers(split)[:most]
    right, on = answers == labels, f"{len(answers)} {split.replace('_', '-')} digits"
    change = right.double() - (original == labels).double()
    return [proportion("accuracy", right, on), mean("accuracy change", change, on), proportion("agreement", answers == original, on)]


def _labelled(split: Split) -> tuple[Tensor, Tensor]:
    training, training_labels, held_out, held_out_labels = images()
    return (held_out, held_out_labels) if split == "held_out" else (training[:CALIBRATION], training_labels[:CALIBRATION])


def _answers(run: Run, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([run({"pixel_values": x}).argmax(-1) for x in images.split(50)])


@cache
def _original_answers(split: Split) -> Tensor:
    model = trained()
    return _answers(lambda batch: model(**batch).logits, _labelled(split)[0])
