"""Finding the subject of pairs that come without a mask."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForUniversalSegmentation

from instantbooth.errors import WeightsError
from instantbooth.images import MIN_FOREGROUND, Silhouette, decode_image, encode_png
from instantbooth.model.base import locate
from instantbooth.model.loading import silent_loading
from instantbooth.model.segmentation import Segmenter, enlarged, silhouette, working_size
from pipelines.curation.pairs import Pair, Reason, Slice
from pipelines.curation.steps import Rules

INSTANCE_MODELS = ("detr", "eomt", "eomt_dinov3", "mask2former", "maskformer")
"""Kinds of transformers' "universal segmentation" that take pictures alone."""


class SubjectFinder:
    """An actor with a segmentation model in transformers' format, semantic or (Mask2Former and its like) of instances.

    Pairs without a mask get that of the largest subject of their class. A model of instances tells subjects that touch
    apart; with a semantic one, several subjects are noticed where their parts of the mask lie apart.
    """

    def __init__(self, name_or_path: str, *, rules: Rules, batch_size: int, device: str) -> None:
        """Loads a folder, or a hub name. WeightsError where it holds no such model."""
        self.rules = rules
        self.batch_size = batch_size
        self.model = load_model(locate(name_or_path), torch.device(device))

    def __call__(self, item: dict[str, Slice]) -> dict[str, Slice]:
        wanted = [pair for pair in item["slice"].pairs if not pair.reason and not pair.mask]
        found = {}
        for start in range(0, len(wanted), self.batch_size):
            batch = wanted[start : start + self.batch_size]
            pictures = [decode_image(pair.image, name=pair.name).convert("RGB") for pair in batch]
            labels = [self._labels(pair.subject) for pair in batch]
            for pair, subjects in zip(batch, self.model.subjects(pictures, labels), strict=True):
                found[pair.row] = self._masked(pair, subjects)
        pairs = tuple(found.get(pair.row, pair) for pair in item["slice"].pairs)
        return {"slice": replace(item["slice"], pairs=pairs)}

    def _labels(self, subject: str) -> set[int]:
        names = {subject, *(noun for noun, name in self.rules.classes().items() if name == subject)}
        return {index for label, index in self.model.labels.items() if label in names}

    def _masked(self, pair: Pair, subjects: list[Silhouette]) -> Pair:
        sized = sorted(((float(subject.mean()), number) for number, subject in enumerate(subjects)), reverse=True)
        if not sized or sized[0][0] < MIN_FOREGROUND:
            return pair.dropped(Reason.NO_SUBJECT, f"the segmentation model sees no {pair.subject} in the picture")
        if len(sized) > 1 and sized[1][0] >= self.rules.second_subject * sized[0][0]:
            shares = " and ".join(f"{share:.0%}" for share, _ in sized[:2])
            return pair.dropped(Reason.SEVERAL_PICTURED, f"the largest of {len(sized)} subjects cover {shares}")
        largest = subjects[sized[0][1]]
        return replace(pair, mask=encode_png(Image.fromarray(np.where(largest, np.uint8(255), np.uint8(0)))))


class SemanticModel:
    """One mask for all subjects of a class."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.segmenter = Segmenter(folder, device=device)
        self.labels = self.segmenter.labels

    @torch.inference_mode()
    def subjects(self, pictures: list[Image.Image], labels: Sequence[set[int]]) -> list[list[Silhouette]]:
        """For each RGB picture the silhouettes of its subjects: pixels whose label is among its `labels`."""
        inputs = self.segmenter.processor(images=pictures, return_tensors="pt").to(self.segmenter.device)
        logits = self.segmenter.model(**inputs).logits
        return [
            [silhouette(scores[None], wanted, picture.size)]
            for scores, wanted, picture in zip(logits, labels, pictures, strict=True)
        ]


class InstanceModel:
    """A mask for every subject."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Loads a folder. WeightsError where it holds no such model."""
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            with silent_loading():
                self.model = AutoModelForUniversalSegmentation.from_pretrained(folder).eval().to(device)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise WeightsError(
                f"{folder} is no segmentation model of transformers ({error}); name one's folder"
            ) from error
        self.segment = self.processor.post_process_panoptic_segmentation
        if "label_ids_to_fuse" in inspect.signature(self.segment).parameters:
            self.segment = partial(self.segment, label_ids_to_fuse=set())
        self.labels = {str(label).lower(): int(index) for index, label in self.model.config.id2label.items()}
        self.device = device

    @torch.inference_mode()
    def subjects(self, pictures: list[Image.Image], labels: Sequence[set[int]]) -> list[list[Silhouette]]:
        """For each RGB picture the silhouettes of its subjects, segments whose label is among its `labels`."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        outputs = {name: value for name, value in self.model(**inputs).items() if isinstance(value, Tensor)}
        found = []
        for number, (picture, wanted) in enumerate(zip(pictures, labels, strict=True)):
            # One at a time: masks are enlarged for every query.
            own = SimpleNamespace(**{name: value[number : number + 1] for name, value in outputs.items()})
            (segments,) = self.segment(own, target_sizes=[working_size(picture.size)[::-1]])
            map_of_ids = segments["segmentation"].cpu().numpy()
            ids = [each["id"] for each in segments["segments_info"] if each["label_id"] in wanted]
            found.append([enlarged(map_of_ids == each, picture.size) for each in ids])
        return found


def load_model(folder: Path, device: torch.device) -> SemanticModel | InstanceModel:
    """The model of a folder. WeightsError where it holds none, or one that takes more than a picture."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} is no segmentation model of transformers ({error}); name its folder") from error
    if type(config) not in AutoModelForUniversalSegmentation._model_mapping:
        return SemanticModel(folder, device)
    if config.model_type not in INSTANCE_MODELS:
        raise WeightsError(
            f"{folder} holds a {config.model_type} model, which takes more than a picture; name one of "
            f"{', '.join(INSTANCE_MODELS)}, or a semantic segmentation model"
        )
    return InstanceModel(folder, device)
