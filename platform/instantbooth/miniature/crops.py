"""Conditioning pictures for training: whole batches of subjects cropped, masked and augmented as tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from instantbooth.miniature.world import SIZE

MARGIN = 0.1
"""Share of the box's longer side left free on either side, as in `images.crop_subject`."""
FOCUS_PROBABILITY = 0.5
FOCUS_AREA = (0.5, 1.0)
WHOLE_SIDE = (0.9, 1.15)
ROTATION = math.radians(15)
STRETCH = 0.1


def to_unit(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in 0 … 1."""
    return images.permute(0, 3, 1, 2).float() / 255


def subject_crops(images: Tensor, masks: Tensor, generator: Generator, *, masked: bool = True) -> Tensor:
    """The subjects alone: float [B, 3, 64, 64] in 0 … 1, black where there is no subject, unless not `masked`.

    `images` is uint8 [B, H, W, 3]; `masks` uint8 [B, H, W], above 127 where the subject is (where nowhere, the whole
    picture is the crop, and black). Each crop starts as the square around the subject. Half of them keep a random part
    of it (area 0.5 … 1, chosen so that most of the head stays), the others are a little larger or smaller; all are
    rotated up to 15°, stretched up to 10 % and flipped at random. `generator` is a CPU generator.
    """
    height, width = masks.shape[1:]
    subject = masks > 127
    pixels = to_unit(images)
    if masked:
        pixels = pixels * subject[:, None]
    left, right = _extent(subject.any(dim=1))
    top, bottom = _extent(subject.any(dim=2))
    half = torch.maximum(right - left, bottom - top) * (0.5 + MARGIN)
    center = torch.stack([left + right, top + bottom], dim=1) / 2
    shift, axes = (drawn.to(images.device) for drawn in _draw_changes(len(images), generator))
    center = center + shift * half[:, None]
    scale = 2 / torch.tensor([width, height], device=images.device)
    theta = torch.cat([axes * half[:, None, None] * scale[:, None], (center * scale - 1)[:, :, None]], dim=2)
    # Autocast would compute the grid in bfloat16, off by up to a sixth of a pixel.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, [len(images), 3, SIZE, SIZE], align_corners=False)
        return F.grid_sample(pixels, grid, align_corners=False)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First index and one past the last index of True in each row of [B, L], as floats; all of it where none is."""
    flags = occupied.float()
    return flags.argmax(dim=1).float(), (flags.shape[1] - flags.flip(1).argmax(dim=1)).float()


def _draw_changes(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Shift of the centre [B, 2] in half sides, and the crop's axes [B, 2, 2] in half sides."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    focus = uniform(0, 1) < FOCUS_PROBABILITY
    side = torch.where(focus, uniform(*FOCUS_AREA).sqrt(), uniform(*WHOLE_SIDE))
    room = (1 - side).clamp(min=0)
    # Heads are in the upper half of a subject's square and in the middle of its width: move up or sideways.
    shift = torch.stack([room * uniform(-1, 1), room * uniform(-1, 0)], dim=1)
    angle, stretch = uniform(-ROTATION, ROTATION), uniform(-STRETCH, STRETCH).exp()
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    return shift, turn * torch.stack([mirror * side * stretch, side / stretch], dim=1)[:, None]
