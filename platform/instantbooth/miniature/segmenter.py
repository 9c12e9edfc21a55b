"""The miniature's segmenter: which pixels are background, person or cat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim.swa_utils import update_bn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from instantbooth.miniature.corpus import CLASSES, Corpus
from instantbooth.miniature.crops import to_unit
from instantbooth.miniature.world import SIZE, Scene, render_empty
from instantbooth.training.loop import LoopConfig, train

TRAINING = LoopConfig(
    steps=1600, learning_rate=2e-3, warmup_steps=50, decay_steps=600, ema_decay=0.99, batch_size=48, processes=2
)
EMPTY = 0.1
"""Share of pictures with nobody in them: without these, a subject is seen in every picture."""
EMPTY_SCENES = 800
"""Of these the empty pictures are drawn."""
LABELS = ("background", *CLASSES)


def new_segmenter() -> SegformerForSemanticSegmentation:
    """An untrained SegFormer of 0.3 M parameters; its logits [N, 3, 16, 16] are a quarter of the picture's size."""
    config = SegformerConfig(
        hidden_sizes=[16, 32, 64, 96],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 3],
        sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=64,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    return SegformerForSemanticSegmentation(config)


def new_image_processor() -> SegformerImageProcessorPil:
    """Resize to 64 px, ImageNet's mean and deviation: what training used, to be saved beside the model."""
    return SegformerImageProcessorPil(size={"height": SIZE, "width": SIZE})


def train_segmenter(
    corpus: Corpus, config: LoopConfig, *, folder: Path, device: torch.device
) -> SegformerForSemanticSegmentation:
    """Cross-entropy of the logits, enlarged to the picture's size; half of the pictures mirrored, some empty."""
    model = new_segmenter().to(device)
    rng = np.random.default_rng([config.seed, 3])
    empty = torch.from_numpy(np.stack([np.asarray(render_empty(Scene.sample(rng))) for _ in range(EMPTY_SCENES)]))
    images, masks = torch.from_numpy(corpus.images), torch.from_numpy(corpus.masks)
    classes = 1 + torch.from_numpy(corpus.identities % 2)

    def draw(examples: int, generator: Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(corpus), (examples,), generator=generator)
        mirrored = torch.rand(examples, generator=generator) < 0.5
        nobody = (torch.rand(examples, generator=generator) < EMPTY)[:, None, None]
        scenes = empty[torch.randint(EMPTY_SCENES, (examples,), generator=generator)]
        pixels = _normalize(torch.where(nobody[..., None], scenes, images[rows]))
        subject = (masks[rows] > 127) & ~nobody
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        subject = torch.where(mirrored[:, None, None], subject.flip(-1), subject)
        return pixels, subject * classes[rows, None, None]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, target = (part.to(device) for part in batch)
        return F.cross_entropy(_full_size(model(pixels).logits), target)

    train("segmenter", model, draw, loss, config, folder=folder, device=device)
    # The batch norm's statistics belong to the last parameters, not to their average: measure them anew.
    update_bn([draw(config.batch_size, Generator().manual_seed(seed))[0] for seed in range(20)], model, device=device)
    return model


@torch.no_grad()
def mask_iou(model: SegformerForSemanticSegmentation, images: Tensor, masks: Tensor, *, batch_size: int = 64) -> float:
    """Mean over pictures of |predicted ∩ true| / |predicted ∪ true| of the subject, of either class.

    `images` uint8 [N, 64, 64, 3], `masks` uint8 [N, 64, 64], above 127 where the subject is.
    """
    shares = []
    for batch, truth in zip(images.split(batch_size), masks.split(batch_size), strict=True):
        logits = _full_size(model(_normalize(batch).to(model.device)).logits)
        predicted, subject = logits.argmax(dim=1).cpu() > 0, truth > 127
        union = (predicted | subject).sum(dim=(1, 2)).clamp(min=1)
        shares.append((predicted & subject).sum(dim=(1, 2)) / union)
    return float(torch.cat(shares).mean())


def _normalize(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] as the image processor gives it."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (to_unit(images) - mean) / std


def _full_size(logits: Tensor) -> Tensor:
    return F.interpolate(logits.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
