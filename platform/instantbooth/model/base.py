"""A frozen Stable Diffusion 1.x model, loaded from diffusers' folder layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from instantbooth.errors import BaseModelError, ParameterError
from instantbooth.model.loading import load_whole
from instantbooth.model.samplers import NoiseSchedule

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


@dataclass(kw_only=True)
class BaseModel:
    """The text-to-image model that personalization leaves as it is."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    schedule: NoiseSchedule

    @classmethod
    def load(cls, name_or_path: str, *, device: torch.device, dtype: torch.dtype) -> BaseModel:
        """Loads a folder, or a hub name. BaseModelError where it is not Stable Diffusion 1.x."""
        folder = locate(name_or_path)
        check_layout(folder)
        try:
            tokenizer = load_tokenizer(folder)
            text_encoder = load_whole(CLIPTextModel, folder / "text_encoder", dtype=dtype)
            vae = load_whole(AutoencoderKL, folder / "vae", torch_dtype=dtype)
            unet = load_whole(UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
            scheduler = dict(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
            schedule = NoiseSchedule.from_config(scheduler)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise BaseModelError(f"{folder} cannot be loaded as Stable Diffusion 1.x: {error}") from error
        longest = text_encoder.config.max_position_embeddings
        if tokenizer.model_max_length > longest:
            raise BaseModelError(
                f"{folder}'s tokenizer takes {tokenizer.model_max_length} tokens, its text encoder {longest}; "
                "correct model_max_length in tokenizer/tokenizer_config.json"
            )
        channels = (unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels)
        if len(set(channels)) > 1:
            raise BaseModelError(
                f"{folder}'s U-Net takes {channels[0]} channels and gives {channels[1]}, its VAE has {channels[2]}: "
                "an inpainting or image-editing model; name a text-to-image one"
            )
        for module in (text_encoder, vae, unet):
            module.requires_grad_(False).eval().to(device)
        return cls(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            schedule=schedule,
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.unet.device  # type: ignore[no-any-return]

    @property
    def text_width(self) -> int:
        """Width of the text encoder's output."""
        return int(self.text_encoder.config.hidden_size)

    @property
    def image_size(self) -> int:
        """Side of the pictures it makes, in pixels."""
        return int(self.unet.config.sample_size) * self.vae_factor

    @cached_property
    def vae_factor(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[no-any-return]

    @property
    def size_step(self) -> int:
        """Sides of pictures are multiples of this many pixels: the U-Net halves its latents between its levels."""
        return self.vae_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)  # type: ignore[no-any-return]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] → prompt embeddings [B, T, W]."""
        return self.text_encoder(input_ids.to(self.device)).last_hidden_state  # type: ignore[no-any-return]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in −1 … 1 → scaled mean latents."""
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mean
        return latents * self.vae.config.scaling_factor  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, latents: Tensor, *, batch_size: int = 16) -> list[Image.Image]:
        """Scaled latents [B, C, H, W] → RGB pictures."""
        pictures = []
        for batch in latents.split(batch_size):
            pixels = self.vae.decode(batch.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
            levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
            pictures += [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]
        return pictures


def unet_outline(folder: Path) -> UNet2DConditionModel:
    """A Stable Diffusion folder's U-Net with names and shapes alone, on the meta device. BaseModelError as `load`."""
    check_layout(folder)
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaseModelError(f"{folder / 'unet'} is no U-Net of Stable Diffusion 1.x: {error}") from error


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a Stable Diffusion folder. BaseModelError where it has none."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    # The tokenizers library raises plain Exceptions.
    except Exception as error:
        raise BaseModelError(
            f"{folder} holds no tokenizer of CLIP's ({error}); name a Stable Diffusion folder"
        ) from error
    if tokenizer.model_max_length >= VERY_LARGE_INTEGER:
        raise BaseModelError(
            f"{folder / 'tokenizer'} does not say how long a prompt may be; give its tokenizer_config.json a "
            "model_max_length"
        )
    return tokenizer


def device_of(device: str | torch.device | None) -> torch.device:
    """The named one, else a GPU where there is one. ParameterError for one that this machine has not."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"device {device!r} is unknown; pass 'cpu', 'cuda' or 'cuda:1'") from error
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ParameterError(
            f"device is {str(device)!r}, which torch cannot use here ({reason}); pass 'cpu', or a GPU that there is"
        ) from error
    return chosen


def local_folder(name_or_path: str) -> Path | None:
    """A local folder as it is, None for what may be a name on the hub, without asking. BaseModelError for neither."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "~", "/")):
        raise BaseModelError(f"{name_or_path!r} is no folder; name one, or a Hugging Face model (owner/name)")
    return None


def anywhere(name_or_path: str) -> str:
    """A local folder's absolute path, which workers in folders of their own find, too; any other name as it is."""
    return str(Path(name_or_path).absolute()) if Path(name_or_path).is_dir() else name_or_path


def locate(name_or_path: str, part: str = "") -> Path:
    """A local folder as it is, a hub name as its snapshot. BaseModelError where neither is found.

    Of the snapshot only `part` ("tokenizer/") is fetched, if one is named.
    """
    if (folder := local_folder(name_or_path)) is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [f"{part}{kind}" for kind in ("*.json", "*.txt", "*.safetensors")]
        return Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"{name_or_path!r} is no folder here and cannot be fetched from the Hugging Face hub ({error}); "
            "correct the path, or go online"
        ) from error


def check_layout(folder: Path) -> None:
    """Raises BaseModelError for a folder that is not laid out as Stable Diffusion 1.x."""
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise BaseModelError(
            f"{folder} is no Stable Diffusion folder: it lacks {', '.join(missing)}; "
            f"a folder in diffusers' layout holds {', '.join(PARTS)}"
        )
    if (folder / "text_encoder_2").is_dir():
        raise BaseModelError(f"{folder} is a Stable Diffusion XL folder; name one of Stable Diffusion 1.x")
