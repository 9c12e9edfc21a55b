"""Reference images to a concept: the half of the method that needs no base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from instantbooth.errors import ImageError
from instantbooth.images import check_image, check_mask, subject_square
from instantbooth.model.base import device_of, locate
from instantbooth.model.conditioning import Concept
from instantbooth.model.encoders import Encoders, ImageEncoder
from instantbooth.model.segmentation import Segmenter
from instantbooth.model.weights import load_weights, tensors_digest, trained_parts
from instantbooth.presets import ModelPreset
from instantbooth.prompts import class_of


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Reference images, ready for the image encoder."""

    pixels: Tensor
    """[N, 3, H, W]."""
    class_noun: str
    image_digests: tuple[str, ...]
    """SHA-256 of each image's pixels."""


class SubjectEncoder:
    """The image encoder, the two layers behind it, and a segmentation model. Instances hold no state between calls."""

    def __init__(self, image_encoder: ImageEncoder, encoders: Encoders, segmenter: Segmenter | None) -> None:
        self.image_encoder = image_encoder
        self.encoders = encoders
        self.segmenter = segmenter

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "miniature",
        *,
        weights: str | Path | None = None,
        image_encoder: str | Path | None = None,
        segmenter: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SubjectEncoder:
        """What `Personalizer.from_pretrained` encodes with, alone: the base model is not read.

        Raises WeightsError.
        """
        parts, folder, config = trained_parts(model, weights, image_encoder, segmenter)
        encoder = cls.assemble(parts, text_width=config.text_width, device=device_of(device), dtype=dtype)
        load_weights(folder, encoder.encoders, prefix="encoders.")
        encoder.encoders.requires_grad_(False)
        return encoder

    @classmethod
    def assemble(
        cls, parts: ModelPreset, *, text_width: int, device: torch.device, dtype: torch.dtype
    ) -> SubjectEncoder:
        """The same with random layers. WeightsError where a folder is not what it should be."""
        image_encoder = ImageEncoder(
            locate(parts.image_encoder), patch_layer=parts.patch_layer, device=device, dtype=dtype
        )
        segmenter = None if parts.segmenter is None else Segmenter(locate(parts.segmenter), device=device)
        encoders = Encoders(
            global_width=image_encoder.global_width, patch_width=image_encoder.patch_width, text_width=text_width
        )
        return cls(image_encoder, encoders.to(device), segmenter)

    @property
    def digest(self) -> str:
        """Names the encoders: concepts made by others are refused."""
        return sha256(f"{self.image_encoder.digest}{tensors_digest(self.encoders.state_dict())}".encode()).hexdigest()

    def encode(
        self,
        images: Sequence[Image.Image],
        class_noun: str = "person",
        masks: Sequence[Image.Image] | None = None,
        *,
        masked: bool = True,
    ) -> Concept:
        """Makes a concept of N ≥ 1 pictures of one subject.

        Each picture is cropped to the subject and its background blacked, as in training. The mask is the given one,
        else the alpha channel where anything is transparent, else what the segmentation model finds; without any, or
        with `masked=False`, the picture is used as it is, as in the paper's own inference. Raises ImageError and
        ParameterError.
        """
        return self.encode_subjects([self.prepare(images, class_noun, masks, masked=masked)])[0]

    @torch.inference_mode()
    def prepare(
        self,
        images: Sequence[Image.Image],
        class_noun: str = "person",
        masks: Sequence[Image.Image] | None = None,
        *,
        masked: bool = True,
    ) -> Subject:
        """The part of `encode` that looks at pictures one by one: all that can be wrong with them is found here."""
        class_of(class_noun)
        references = _check_references(images, masks)
        prepared = [
            self._prepare(image, mask, f"image {number}", class_noun, masked)
            for number, (image, mask) in enumerate(references, start=1)
        ]
        return Subject(
            pixels=torch.stack([self.image_encoder.preprocess(image) for image in prepared]),
            class_noun=class_noun,
            image_digests=tuple(sha256(image.tobytes()).hexdigest() for image, _ in references),
        )

    @torch.inference_mode()
    def encode_subjects(self, subjects: Sequence[Subject]) -> list[Concept]:
        """The concepts of several prepared subjects, in one forward pass."""
        counts = [len(subject.pixels) for subject in subjects]
        pixels = torch.cat([subject.pixels for subject in subjects]).to(self.image_encoder.mean.device)
        embeddings, features = self.encoders(*self.image_encoder(pixels))
        digest = self.digest
        return [
            Concept.of(
                concept_embeddings,
                patch_features,
                class_noun=subject.class_noun,
                encoder_digest=digest,
                image_digests=subject.image_digests,
            )
            for subject, concept_embeddings, patch_features in zip(
                subjects, embeddings.split(counts), features.split(counts), strict=True
            )
        ]

    def _prepare(
        self, image: Image.Image, mask: Image.Image | None, name: str, class_noun: str, masked: bool
    ) -> Image.Image:
        if mask is None and image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
            mask = check_mask(image.getchannel("A"), image, f"the transparency of {name}")
        if mask is None and masked and self.segmenter is not None:
            mask = self.segmenter.mask(image.convert("RGB"), class_noun, name)
        return subject_square(image, mask if masked else None)


def _check_references(
    images: Sequence[Image.Image], masks: Sequence[Image.Image] | None
) -> list[tuple[Image.Image, Image.Image | None]]:
    if isinstance(images, Image.Image) or not isinstance(images, Sequence):
        raise ImageError(f"images is {type(images).__name__}; pass a list of PIL images")
    if not images:
        raise ImageError("0 reference images given; pass at least 1")
    if masks is not None and (isinstance(masks, Image.Image) or not isinstance(masks, Sequence)):
        raise ImageError(f"masks is {type(masks).__name__}; pass a list of PIL images, one for each image")
    if masks is not None and len(masks) != len(images):
        raise ImageError(f"{len(masks)} masks given for {len(images)} images; pass one for each image, or none")
    checked = [check_image(image, name=f"image {n}") for n, image in enumerate(images, start=1)]
    if masks is None:
        return [(image, None) for image in checked]
    return [
        (image, check_mask(mask, image, f"mask {n}"))
        for n, (image, mask) in enumerate(zip(checked, masks, strict=True), start=1)
    ]
