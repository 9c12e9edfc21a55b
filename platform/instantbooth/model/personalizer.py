"""The whole method: reference images to a concept, concept and prompts to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPVisionConfig

from instantbooth.config import GenerationDefaults, WeightsConfig
from instantbooth.errors import ConceptError, ParameterError, PromptError, WeightsError
from instantbooth.model.adapter import KeysValues, attach
from instantbooth.model.base import BaseModel, device_of, locate, unet_outline
from instantbooth.model.conditioning import Concept, concept_keys_values, inject
from instantbooth.model.denoise import Row, denoise, unit_noise
from instantbooth.model.encoders import Encoders
from instantbooth.model.samplers import SamplerTable, sampler_table
from instantbooth.model.subjects import SubjectEncoder
from instantbooth.model.weights import (
    fitting_tensors,
    load_weights,
    read_tensors,
    save_weights,
    tensors_digest,
    trained_parts,
)
from instantbooth.parameters import check_range
from instantbooth.presets import ModelPreset, model_parts
from instantbooth.prompts import SUBJECT_FIELD, expand, tokenize, tokenize_subject

MAX_BATCH = 32
"""Requests denoised together; more are taken in turn."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make: what a row of a batch is."""

    prompt: str
    """Expanded: the placeholder stands before the noun."""
    negative_prompt: str
    concept: Concept
    table: SamplerTable
    guidance_scale: float
    adapter_scale: float
    concept_scale: float
    seed: int
    height: int
    """Pixels, a multiple of BaseModel.size_step."""
    width: int

    @property
    def guided(self) -> bool:
        """Whether guidance doubles its cost, and its negative prompt is looked at."""
        return self.guidance_scale > 1


class Trained(nn.Module):
    """All that training changes: the two fully connected layers and the adapters."""

    def __init__(self, encoders: Encoders, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.encoders = encoders
        self.adapters = adapters


class Personalizer:
    """Encodes subjects and generates pictures of them, with every part of Stable Diffusion frozen.

    Instances hold no state between calls. `from_pretrained` loads trained weights, `untrained` starts anew.
    """

    def __init__(self, base: BaseModel, subject_encoder: SubjectEncoder, defaults: GenerationDefaults) -> None:
        self.base = base
        self.subject_encoder = subject_encoder
        self.image_encoder = subject_encoder.image_encoder
        self.defaults = defaults
        self.trained = Trained(subject_encoder.encoders, attach(base.unet, base.text_width))
        self.trained.requires_grad_(False)
        self.placeholder_token = WeightsConfig.placeholder_token
        self._loaded_digest: str | None = None

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
    ) -> Personalizer:
        """Loads a preset ("miniature", "sd15") or a Stable Diffusion 1.x folder, with trained weights.

        models:/instantbooth@champion, from the registry at MLFLOW_TRACKING_URI, names weights and their base at once.
        `weights` is a folder with config.json and weights.safetensors, or registered; the miniature brings its own.
        `image_encoder` is a CLIP folder (the folder's own image_encoder/ where there is one), `segmenter` a
        segmentation model.
        Raises BaseModelError, WeightsError and, for a device that is not there, ParameterError.
        """
        parts, folder, config = trained_parts(model, weights, image_encoder, segmenter)
        booth = cls._assemble(parts, config.defaults, device, dtype)
        booth.placeholder_token = config.placeholder_token
        load_weights(folder, booth.trained)
        if dtype != torch.float32:
            booth._loaded_digest = tensors_digest(read_tensors(folder))
        return booth

    @classmethod
    def untrained(
        cls,
        model: str | Path = "miniature",
        *,
        image_encoder: str | Path | None = None,
        segmenter: str | Path | None = None,
        patch_layer: int | None = None,
        defaults: GenerationDefaults | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Personalizer:
        """The same where training starts: closed gates, adapters as their blocks' self-attention, random encoders."""
        parts = model_parts(model, None, image_encoder, segmenter)
        if patch_layer is not None:
            parts = replace(parts, patch_layer=patch_layer)
        return cls._assemble(parts, defaults or GenerationDefaults(), device, dtype)

    @classmethod
    def _assemble(
        cls, parts: ModelPreset, defaults: GenerationDefaults, device: str | torch.device | None, dtype: torch.dtype
    ) -> Personalizer:
        target = device_of(device)
        base = BaseModel.load(parts.base, device=target, dtype=dtype)
        subject_encoder = SubjectEncoder.assemble(parts, text_width=base.text_width, device=target, dtype=dtype)
        return cls(base, subject_encoder, defaults)

    @property
    def config(self) -> WeightsConfig:
        """What `save_weights` writes into config.json."""
        return WeightsConfig(
            placeholder_token=self.placeholder_token,
            patch_layer=self.image_encoder.patch_layer,
            global_width=self.image_encoder.global_width,
            patch_width=self.image_encoder.patch_width,
            text_width=self.base.text_width,
            adapters=len(self.trained.adapters),
            defaults=self.defaults,
        )

    def save_weights(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and weights.safetensors, which `from_pretrained(weights=…)` reads."""
        save_weights(Path(folder), self.config, self.trained, dtype=dtype)

    @property
    def encoder_digest(self) -> str:
        """Names the encoders: concepts made by others are refused."""
        return self.subject_encoder.digest

    @property
    def weights_digest(self) -> str:
        """Names everything trained, for provenance: in half precision, what was loaded."""
        return self._loaded_digest or tensors_digest(self.trained.state_dict())

    def encode(
        self,
        images: Sequence[Image.Image],
        class_noun: str = "person",
        masks: Sequence[Image.Image] | None = None,
        *,
        masked: bool = True,
    ) -> Concept:
        """Makes a concept of N ≥ 1 pictures of one subject: see SubjectEncoder.encode, whose errors it raises."""
        return self.subject_encoder.encode(images, class_noun, masks, masked=masked)

    def generate(
        self,
        prompts: str | Sequence[str],
        concepts: Concept | Sequence[Concept],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        adapter_scale: float | Sequence[float] | None = None,
        concept_scale: float | Sequence[float] | None = None,
        sampler: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Pictures of the subjects in the prompted scenes, prompt by prompt.

        Prompts hold "{subject}" once. One concept, or one for each prompt; so with every parameter but height and
        width (pixels, the base model's own unless given): a value, or a list with one for each prompt. None means the
        weights' own default. Picture n of a prompt has seed + n, and is the same in any company: to the last
        bit in batches of one shape, within 1e-4 on latents otherwise. Raises PromptError, ParameterError and
        ConceptError before any model runs.
        """
        requests = self.requests(
            prompts,
            concepts,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            adapter_scale=adapter_scale,
            concept_scale=concept_scale,
            sampler=sampler,
            seed=seed,
            height=height,
            width=width,
        )
        return self.base.decode(self.sample(requests))

    def requests(
        self,
        prompts: str | Sequence[str],
        concepts: Concept | Sequence[Concept],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        adapter_scale: float | Sequence[float] | None = None,
        concept_scale: float | Sequence[float] | None = None,
        sampler: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Request]:
        """Checks and spreads what `generate` takes: one request for each picture."""
        if not isinstance(prompts, Sequence):
            raise PromptError(f"prompts is {type(prompts).__name__}; pass a text, or a list of texts")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise PromptError("no prompts given; pass at least one, such as 'a photo of a {subject}'")
        check_range("num_images_per_prompt", num_images_per_prompt)
        size = {"height": self._side("height", height), "width": self._side("width", width)}
        subjects = _spread("concepts", concepts, prompts)
        encoders = self.encoder_digest
        parameters = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "adapter_scale": adapter_scale,
            "concept_scale": concept_scale,
            "sampler": sampler,
            "seed": seed,
        }
        columns = {name: _spread(name, value, prompts) for name, value in parameters.items()}
        requests = []
        for row, (prompt, concept) in enumerate(zip(prompts, subjects, strict=True)):
            chosen = {name: column[row] for name, column in columns.items()}
            first = self._request(prompt, _checked(concept, encoders), chosen | size)
            requests += [replace(first, seed=first.seed + n) for n in range(num_images_per_prompt)]
        return requests

    def _request(self, prompt: object, concept: Concept, chosen: dict[str, Any]) -> Request:
        values = {
            name: getattr(self.defaults, name) if value is None and hasattr(self.defaults, name) else value
            for name, value in chosen.items()
        }
        for name in ("num_inference_steps", "guidance_scale", "adapter_scale", "concept_scale", "seed"):
            check_range(name, values[name])
        negative = values["negative_prompt"] or ""
        if not isinstance(negative, str) or SUBJECT_FIELD in negative:
            raise PromptError(f"negative_prompt {negative!r} must be text without {{subject}}; remove it")
        text = expand(prompt, concept.class_noun, self.placeholder_token)
        tokenize_subject(self.base.tokenizer, text, self.placeholder_token)
        return Request(
            prompt=text,
            negative_prompt=negative,
            concept=concept,
            table=sampler_table(str(values["sampler"]), int(values["num_inference_steps"]), self.base.schedule),
            guidance_scale=float(values["guidance_scale"]),
            adapter_scale=float(values["adapter_scale"]),
            concept_scale=float(values["concept_scale"]),
            seed=int(values["seed"]),
            height=values["height"],
            width=values["width"],
        )

    def _side(self, name: str, pixels: object) -> int:
        native, step = self.base.image_size, self.base.size_step
        if pixels is None:
            return native
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels % step or not step <= pixels <= 2 * native:
            raise ParameterError(
                f"{name} must be a multiple of {step} from {step} to {2 * native} pixels, is {pixels!r}; "
                f"pass {native}, the model's own, or another multiple"
            )
        return pixels

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request]) -> Tensor:
        """Final latents [B, C, h, w] of the requests, which are of one size, denoised together."""
        known: dict[str, dict[str, KeysValues]] = {}
        done = []
        for start in range(0, len(requests), MAX_BATCH):
            chosen = requests[start : start + MAX_BATCH]
            concepts = {request.concept.digest: request.concept for request in chosen}
            known = {name: known.get(name) or self.keys_values(concept) for name, concept in concepts.items()}
            rows = self.rows(chosen)
            for row, request in zip(rows, chosen, strict=True):
                row.keys_values = known[request.concept.digest]
            for latents in denoise(self.base.unet, rows):
                pass
            done.append(latents)
        return torch.cat(done)

    def keys_values(self, concept: Concept) -> dict[str, KeysValues]:
        """The concept's keys and values in every adapter, which a row needs before its first step."""
        return concept_keys_values(self.trained.adapters, concept)

    def prompt_embeds(self, input_ids: Tensor, positions: Tensor, concept_embeddings: Tensor) -> Tensor:
        """Token ids [B, T], positions of V̂ [B] and what stands there [B, W] → prompt embeddings [B, T, W]."""
        texts = self.base.encode_text(input_ids)
        return inject(texts, positions.to(texts.device), concept_embeddings)

    @torch.inference_mode()
    def rows(self, requests: Sequence[Request]) -> list[Row]:
        """Embeds prompts, injects concepts, draws noise; the rows still lack their keys and values."""
        device, tokenizer, factor = self.base.device, self.base.tokenizer, self.base.vae_factor
        embeddings = torch.cat([r.concept.concept_embedding.to(device) * r.concept_scale for r in requests])
        tokenized = [tokenize_subject(tokenizer, request.prompt, self.placeholder_token) for request in requests]
        ids, positions = (torch.tensor(column) for column in zip(*tokenized, strict=True))
        prompt_embeds = self.prompt_embeds(ids, positions, embeddings)
        negative = [tokenize(tokenizer, request.negative_prompt) for request in requests if request.guided]
        negative_embeds = iter(self.base.encode_text(torch.tensor(negative)) if negative else ())
        return [
            Row(
                table=request.table,
                prompt_embeds=prompt,
                negative_embeds=next(negative_embeds) if request.guided else None,
                guidance_scale=request.guidance_scale,
                adapter_scale=request.adapter_scale,
                latents=unit_noise(
                    request.seed,
                    (self.base.unet.config.in_channels, request.height // factor, request.width // factor),
                    device,
                ),
            )
            for request, prompt in zip(requests, prompt_embeds, strict=True)
        ]


def check_fit(parts: ModelPreset) -> None:
    """WeightsError where the trained weights of `parts` are of another base or image encoder.

    Only shapes are compared: neither of the models is loaded.
    """
    base, clip = locate(parts.base), locate(parts.image_encoder)
    _, folder, _ = trained_parts(base, parts.weights, parts.image_encoder, None)
    try:
        text = CLIPTextConfig.from_pretrained(base / "text_encoder")
        vision = CLIPVisionConfig.from_pretrained(clip)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{base} or {clip} cannot be read ({error}); name a base and a CLIP folder") from error
    unet = unet_outline(base)
    with torch.device("meta"):
        encoders = Encoders(
            global_width=vision.projection_dim, patch_width=vision.hidden_size, text_width=text.hidden_size
        )
        fitting_tensors(folder, Trained(encoders, attach(unet, text.hidden_size)))


def _checked(concept: object, encoder_digest: str) -> Concept:
    if not isinstance(concept, Concept):
        raise ParameterError(f"concept is {type(concept).__name__}; pass what encode or Concept.load returned")
    if concept.encoder_digest != encoder_digest:
        raise ConceptError(
            f"the concept was made by encoders {concept.encoder_digest[:12]}, these weights have "
            f"{encoder_digest[:12]}; encode the reference images again with these weights"
        )
    return concept


def _spread(name: str, value: object, prompts: Sequence[str]) -> list[object]:
    """One value for every prompt."""
    if isinstance(value, str | Concept) or not isinstance(value, Sequence):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ParameterError(f"{name} has {len(value)} values for {len(prompts)} prompts; pass one, or one for each")
    return list(value)
