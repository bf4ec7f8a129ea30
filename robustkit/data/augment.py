"""Random crop, flip and rotation of a batch on its own device.

Nothing is interpolated and nothing waits for the device: each result is a choice of the image's own pixels (and zeros),
picked for the whole batch by one gather.
"""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.rng import Generator

Augment = Literal["none", "crop", "crop-flip", "crop-flip-rotate"]
"""What a data set may do to its training images."""

Padding = Literal["zero", "reflect"]
"""What a crop sees beyond the border."""

PADDING = 4
DEGREES = 15.0


@attrs.frozen
class Augmentation:
    """Crop out of the image padded by `padding` pixels, then flip (half of the images), then rotate by +-`degrees`."""

    padding: int = PADDING
    mode: Padding = "zero"
    flip: bool = False
    degrees: float = 0.0


def augmentation(name: Augment, mode: Padding) -> Augmentation | None:
    """What a data set's `augment` and `padding` settings mean."""
    if name == "none":
        return None
    return Augmentation(mode=mode, flip="flip" in name, degrees=DEGREES if "rotate" in name else 0.0)


def augment(x: Tensor, augmentation: Augmentation, generator: Generator) -> Tensor:
    """Images (B, C, H, W), each changed by its own draws; same shape, pixels stay in [0, 1]."""
    if augmentation.padding:
        offsets = 2 * augmentation.padding + 1
        top, left = generator.integers(offsets, x), generator.integers(offsets, x)
        x = crop(x, top, left, augmentation.padding, augmentation.mode)
    if augmentation.flip:
        x = flip(x, generator.integers(2, x) == 1)
    if augmentation.degrees:
        x = rotate(x, (2 * generator.uniform(x[:, 0, 0, 0]) - 1) * augmentation.degrees)
    return x


def crop(x: Tensor, top: Tensor, left: Tensor, padding: int, mode: Padding) -> Tensor:
    """The H x W window at (`top`, `left`), each (B,) int64 in [0, 2 * padding], of every padded image (B, C, H, W)."""
    _, _, height, width = x.shape
    rows = top[:, None, None] + torch.arange(height, device=x.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=x.device)
    return _pick(F.pad(x, [padding] * 4, mode="constant" if mode == "zero" else "reflect"), rows, columns)


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored left to right where `chosen` (B,) bool."""
    return torch.where(chosen[:, None, None, None], x.flip(-1), x)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Images (B, C, H, W), turned counter-clockwise by `degrees` (B,): nearest pixel, zeros from outside."""
    _, _, height, width = x.shape
    angle = (degrees.float() * (math.pi / 180))[:, None, None]
    down = (torch.arange(height, device=x.device) - (height - 1) / 2)[:, None]
    right = torch.arange(width, device=x.device) - (width - 1) / 2
    rows = (angle.sin() * right + angle.cos() * down + (height - 1) / 2).round().long()  # where the pixel comes from
    columns = (angle.cos() * right - angle.sin() * down + (width - 1) / 2).round().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return _pick(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1)) * inside[:, None]


def _pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C, H', W'): of each image the pixels at `rows` and `columns`, which broadcast to (B, H', W')."""
    batch, channels, _, width = x.shape
    source = rows * width + columns
    pixels = x.flatten(2).gather(2, source.view(batch, 1, -1).expand(-1, channels, -1))
    return pixels.view(batch, channels, *source.shape[1:])
