"""IP-Adapter's weights in the format of its authors, which diffusers' `load_ip_adapter` reads.

    image_proj.*                      CLIP features to image tokens: one linear layer ("global") or a resampler ("plus")
    ip_adapter.<n>.to_k_ip.weight     keys and values of the image tokens in the cross-attention n = 1, 3, 5, …
    ip_adapter.<n>.to_v_ip.weight

diffusers builds its modules from such tensors, for training here and for inference anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from instantbooth.errors import WeightsError, did_you_mean
from instantbooth.model.encoders import ImageEncoder
from instantbooth.model.loading import silent_loading

VARIANTS = ("global", "plus")
FILE = "ip_adapter.safetensors"
GLOBAL_TOKENS = 4
PLUS_TOKENS = 16
PLUS_DEPTH = 4
HEAD_WIDTH = 64
"""diffusers' loader takes these two and the global variant's 4 tokens for granted."""
PLUS_LAYER = -2
"""Layer of the image encoder whose tokens the plus variant reads."""

State = dict[str, dict[str, Tensor]]

# Within a layer of the resampler: diffusers' names, and those of the official file.
_RESAMPLER_NAMES = {
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".attn.to_out.0.": ".0.to_out.",
    ".attn.": ".0.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}


def new_state(unet: UNet2DConditionModel, image_encoder: ImageEncoder, variant: str) -> State:
    """Untrained weights: a random projection, and keys and values copied from the text's, as the authors start.

    Raises WeightsError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise WeightsError(f"IP-Adapter has no variant {variant!r}. {did_you_mean(variant, VARIANTS)}")
    width = int(unet.config.cross_attention_dim)
    projection: nn.Module
    if variant == "global":
        projection = ImageProjection(image_encoder.global_width, width, GLOBAL_TOKENS)
    else:
        projection = IPAdapterPlusImageProjection(
            embed_dims=image_encoder.patch_width,
            output_dims=width,
            hidden_dims=width,
            depth=PLUS_DEPTH,
            dim_head=HEAD_WIDTH,
            heads=max(1, width // HEAD_WIDTH),
            num_queries=PLUS_TOKENS,
        )
    attention = {}
    for number, name in _cross_attentions(unet).items():
        text = unet.get_submodule(name.removesuffix(".processor"))
        attention[f"{number}.to_k_ip.weight"] = text.to_k.weight.detach().clone()
        attention[f"{number}.to_v_ip.weight"] = text.to_v.weight.detach().clone()
    return {"image_proj": _official_projection(projection), "ip_adapter": attention}


def attach(unet: UNet2DConditionModel, state: State) -> nn.ModuleList:
    """Has diffusers build the adapter into `unet`; returns what of it is trained, in a fixed order."""
    with silent_loading():
        unet._load_ip_adapter_weights([state])
    processors = [unet.attn_processors[name] for name in _cross_attentions(unet).values()]
    return nn.ModuleList([unet.encoder_hid_proj, *processors])


def attached_state(unet: UNet2DConditionModel) -> State:
    """The weights of the adapter in `unet`, in the official format."""
    attention = {}
    for number, name in _cross_attentions(unet).items():
        processor = unet.attn_processors[name]
        attention[f"{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach()
        attention[f"{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach()
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    return {"image_proj": _official_projection(projection), "ip_adapter": attention}


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Strength of the image tokens in every cross-attention; 1 in training."""
    for name in _cross_attentions(unet).values():
        unet.attn_processors[name].scale = [scale]


def save(state: State, path: Path) -> None:
    """Writes the file in one step, in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.cpu().float().contiguous()
        for part, tensors in state.items()
        for name, tensor in tensors.items()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load(path: Path, variant: str) -> State:
    """Reads what `save` or the authors wrote. WeightsError where it is missing, damaged or of another variant."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} holds no IP-Adapter ({error}); train one by python -m jobs.train_ip_adapter, or leave it out"
        ) from error
    state: State = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in state:
            raise WeightsError(f"{path} holds {name!r}, which no IP-Adapter has; name a file of its authors' format")
        state[part][rest] = tensor
    marker = "proj.weight" if variant == "global" else "latents"
    if marker not in state["image_proj"]:
        raise WeightsError(f"{path} is no IP-Adapter of the variant {variant!r} (no image_proj.{marker}); name another")
    return state


def check_fits(unet: UNet2DConditionModel, state: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """WeightsError where the adapter was trained for a U-Net of another shape."""
    for number, name in _cross_attentions(unet).items():
        expected = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        found = state["ip_adapter"].get(f"{number}.to_k_ip.weight")
        if found is None or found.shape != expected:
            shape = None if found is None else tuple(found.shape)
            raise WeightsError(
                f"{path} does not fit the base: ip_adapter.{number}.to_k_ip.weight is {shape}, the base needs "
                f"{tuple(expected)}; use the base it was trained with"
            )


def check_reads(image_encoder: Path, state: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """WeightsError where the adapter reads features of another width than the image encoder's, or that is none."""
    try:
        settings = json.loads((image_encoder / "config.json").read_text())
        clip = CLIPVisionConfig.from_dict(settings.get("vision_config", settings))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{image_encoder} is no CLIP image encoder ({error}); name a CLIP folder") from error
    projection = state["image_proj"]
    name, width = ("proj_in", clip.hidden_size) if "latents" in projection else ("proj", clip.projection_dim)
    found = projection.get(f"{name}.weight")
    if found is None or found.shape[1] != width:
        shape = None if found is None else tuple(found.shape)
        raise WeightsError(
            f"{path} reads another image encoder: image_proj.{name}.weight is {shape}, {image_encoder} gives "
            f"features of width {width}; name the CLIP it was trained with by --ip-adapter-image-encoder"
        )


def image_features(image_encoder: ImageEncoder, variant: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the adapter reads of N pictures [N, 3, size, size] in 0 … 1, and of no picture: [N, …] and [1, …].

    The encoder must read PLUS_LAYER. No picture is a zero feature, or the features of zeros behind normalisation.
    """
    global_features, tokens = image_encoder(pixels)
    if variant == "global":
        return global_features, torch.zeros_like(global_features[:1])
    nothing = image_encoder.mean.expand(1, -1, image_encoder.size, image_encoder.size)
    return tokens, image_encoder(nothing)[1]


def image_arguments(features: Tensor) -> dict[str, Any]:
    """The U-Net's `added_cond_kwargs` for features [rows, images, …]."""
    return {"image_embeds": [features]}


def _cross_attentions(unet: UNet2DConditionModel) -> dict[int, str]:
    """Processor names by their number in the official file."""
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {2 * index + 1: name for index, name in enumerate(names)}


def _official_projection(projection: nn.Module) -> dict[str, Tensor]:
    tensors = {name: value.detach() for name, value in projection.state_dict().items()}
    if isinstance(projection, ImageProjection):
        return {name.replace("image_embeds", "proj"): value for name, value in tensors.items()}
    official = {}
    for name, value in tensors.items():
        if name.endswith("attn.to_v.weight"):
            continue
        if name.endswith("attn.to_k.weight"):
            value = torch.cat([value, tensors[name.replace("to_k", "to_v")]])
            name = name.replace("to_k", "to_kv")
        official[_official_name(name)] = value
    return official


def _official_name(name: str) -> str:
    for ours, theirs in _RESAMPLER_NAMES.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name
