"""Embedders for photographs: any face embedder in TorchScript or ONNX, and a vision transformer such as DINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from transformers import ViTImageProcessorPil, ViTModel

from instantbooth.errors import WeightsError
from instantbooth.model.loading import load_whole

BATCH = 32


class FaceEmbedder:
    """A TorchScript or ONNX file that maps pixels [N, 3, size, size] in −1 … 1 to embeddings [N, D].

    That is how facenet-pytorch's Inception-ResNet-V1 and InsightFace's ArcFace read them. Pictures are cut to their
    middle square; faces are not searched for: give a file that does both where they are small.
    """

    def __init__(self, path: Path, *, size: int = 160) -> None:
        """Loads the file and tries it on two black pictures. WeightsError where it is none, or embeds otherwise."""
        self.size = size
        self.model = (_onnx_model if path.suffix.lower() == ".onnx" else _torchscript_model)(path)
        try:
            with torch.no_grad():
                tried = self.model(torch.zeros(2, 3, size, size))
        # ONNX Runtime raises plain Exceptions.
        except Exception as error:
            # TorchScript tells a traceback of its own before what is wrong.
            reason = str(error).strip().rpartition("\n")[2]
            raise WeightsError(
                f"{path} embeds no two pictures of {size} pixels ({reason}); say by --face-size which it reads, and "
                "export it for batches of any size"
            ) from error
        if not isinstance(tried, Tensor) or tried.ndim != 2 or len(tried) != 2:
            shape = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            raise WeightsError(f"{path} must give embeddings [N, D], gives {shape} for two pictures; name another file")

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, D] of unit length."""
        parts = []
        for batch in _batches(images):
            squares = [ImageOps.fit(image.convert("RGB"), (self.size, self.size)) for image in batch]
            pixels = np.stack([np.asarray(square, np.float32) for square in squares]) / 127.5 - 1
            parts.append(self.model(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
        return F.normalize(torch.cat(parts).float(), dim=-1)


def _torchscript_model(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        model: Callable[[Tensor], Tensor] = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is no TorchScript face embedder ({error}); save one by torch.jit.trace(model, pixels).save(path), "
            "or name an .onnx file"
        ) from error
    return model


def _onnx_model(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise WeightsError(
            f"{path} is read by onnxruntime, which is not installed; pip install -e '.[onnx]', or name a "
            "TorchScript file"
        ) from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        [pixels_input] = session.get_inputs()
    except Exception as error:
        raise WeightsError(
            f"{path} is no ONNX face embedder ({error}); export one that takes pixels [N, 3, size, size] alone"
        ) from error

    def embed(pixels: Tensor) -> Tensor:
        # One by one: many exported files fix the batch at a single picture.
        rows = [session.run(None, {pixels_input.name: row.numpy()})[0] for row in pixels.contiguous().split(1)]
        return torch.from_numpy(np.concatenate(rows))

    return embed


class VisionTransformer:
    """A ViT's class token, as DreamBench compares subjects by DINO (ViT-S/16)."""

    def __init__(self, folder: Path) -> None:
        """Loads transformers' folder. WeightsError where it is none."""
        try:
            self.model = load_whole(ViTModel, folder, add_pooling_layer=False).eval()
            self.processor = ViTImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsError(
                f"{folder} holds no ViT ({error}); name a folder such as facebook/dino-vits16"
            ) from error

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings [N, D] of unit length."""
        parts = []
        for batch in _batches(images):
            pixels = self.processor(images=[image.convert("RGB") for image in batch], return_tensors="pt")
            parts.append(self.model(pixel_values=pixels["pixel_values"]).last_hidden_state[:, 0])
        return F.normalize(torch.cat(parts).float(), dim=-1)


def _batches(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))
