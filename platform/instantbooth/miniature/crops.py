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


def on_black(images: Tensor, masks: Tensor) -> Tensor:
    """The subjects alone: float [B, 3, H, W] in 0 … 1, black where there is no subject.

    `images` is uint8 [B, H, W, 3]; `masks` uint8 [B, H, W], above 127 where the subject is.
    """
    return to_unit(images) * _subject(masks)


def on_scenes(images: Tensor, masks: Tensor, scenes: Tensor, scene_masks: Tensor) -> Tensor:
    """The subjects before other pictures, float [B, 3, H, W] in 0 … 1; shapes are those of `on_black`.

    Whoever is in a scene is painted over with the mean colour of the rest of it.
    """
    behind, hidden = to_unit(scenes), _subject(scene_masks)
    seen = (~hidden).sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = (behind * ~hidden).sum(dim=(2, 3), keepdim=True) / seen
    return torch.where(_subject(masks), to_unit(images), torch.where(hidden, mean, behind))


def subject_crops(pixels: Tensor, masks: Tensor, generator: Generator, *, looseness: Tensor | None = None) -> Tensor:
    """Squares around the subjects, changed at random: float [B, 3, 64, 64], black beyond the picture.

    `pixels` is float [B, 3, H, W]; `masks` uint8 [B, H, W], above 127 where the subject is (where nowhere, the whole
    picture is the crop). Each crop starts as the square around the subject or, by its `looseness` [B] from 0 to 1, on
    the way from there to the whole picture's. Half of them keep a random part of it (area 0.5 … 1, chosen so that most
    of the head stays), the others are a little larger or smaller; all are rotated up to 15°, stretched up to 10 % and
    flipped at random. `generator` is a CPU generator.
    """
    size = torch.tensor([masks.shape[2], masks.shape[1]], device=pixels.device)
    subject = _subject(masks)[:, 0]
    left, right = _extent(subject.any(dim=1))
    top, bottom = _extent(subject.any(dim=2))
    half = torch.maximum(right - left, bottom - top) * (0.5 + MARGIN)
    center = torch.stack([left + right, top + bottom], dim=1) / 2
    if looseness is not None:
        half = torch.lerp(half, (size.max() / 2).expand_as(half), looseness)
        center = torch.lerp(center, (size / 2).expand_as(center), looseness[:, None])
    shift, axes = (drawn.to(pixels.device) for drawn in _draw_changes(len(pixels), generator))
    center = center + shift * half[:, None]
    scale = 2 / size
    theta = torch.cat([axes * half[:, None, None] * scale[:, None], (center * scale - 1)[:, :, None]], dim=2)
    # Autocast would compute the grid in bfloat16, off by up to a sixth of a pixel.
    with torch.autocast(pixels.device.type, enabled=False):
        grid = F.affine_grid(theta, [len(pixels), 3, SIZE, SIZE], align_corners=False)
        return F.grid_sample(pixels, grid, align_corners=False)


def _subject(masks: Tensor) -> Tensor:
    """True [B, 1, H, W] where the subject is."""
    return masks[:, None] > 127


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
