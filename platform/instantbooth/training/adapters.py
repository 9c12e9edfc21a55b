"""Training the method: adapters and the two fully connected layers, everything else frozen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn
from transformers import CLIPTokenizer

from instantbooth.errors import BaseModelError
from instantbooth.images import Augmentation, augment, crop_subject, mask_background, replace_background
from instantbooth.model.adapter import References, adapter_kwargs
from instantbooth.model.base import BaseModel, load_tokenizer, locate
from instantbooth.model.conditioning import inject
from instantbooth.model.encoders import resize_to_bytes
from instantbooth.model.objective import add_noise, denoising_loss, draw_timesteps, subject_weights
from instantbooth.model.personalizer import Personalizer
from instantbooth.parameters import check_bounds
from instantbooth.prompts import SUBJECT_FIELD, expand, tokenize_subject
from instantbooth.training.attention import write_out_attention

PACKED = ("pixel_values", "reference_pixels", "subject_mask")
"""What examples have as bytes, a quarter of the size, until they are trained on."""

SHARE = (0.0, 1.0)
BOUNDS = {
    "steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "adapter_learning_rate": SHARE,
    "encoder_learning_rate": SHARE,
    "warmup_steps": (0, math.inf),
    "weight_decay": SHARE,
    "ema_decay": SHARE,
    "clip_norm": (1e-6, math.inf),
    "text_dropout": SHARE,
    "image_dropout": SHARE,
    "both_dropout": SHARE,
    "replaced_backgrounds": SHARE,
    "background_weight": SHARE,
    "seed": (0, 2**63 - 1),
}
"""Lowest and highest value of each field of AdapterTrainingConfig."""


@dataclass(frozen=True, kw_only=True)
class AdapterTrainingConfig:
    """The method's hyperparameters. The defaults suit the miniature; the paper's are in parentheses."""

    steps: int = 1200
    """Optimizer steps (320 000 for persons, 200 000 for cats)."""
    batch_size: int = 32
    """Text-image pairs in a step, over all workers (16)."""
    adapter_learning_rate: float = 6e-4
    """AdamW's, for the adapters (1e-6)."""
    encoder_learning_rate: float = 6e-4
    """AdamW's, for the two fully connected layers (1e-4)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    ema_decay: float = 0.995
    """Decay of the averaged parameters, which are the weights that training hands over."""
    clip_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    text_dropout: float = 0.08
    """Share of rows trained without a caption: "V̂ noun" alone is said."""
    image_dropout: float = 0.08
    """Share of rows trained without patch features (β = 0)."""
    both_dropout: float = 0.0
    """Share of rows trained without both, beside those that the two above meet by chance."""
    replaced_backgrounds: float = 0.0
    """Share of references that stand before another pair's background, framed more loosely, instead of on black (0).
    From them the model learns to find the subject where a reference is not masked."""
    background_weight: float = 1.0
    """The loss's weight outside the subject, against 1 on it; 1 is the paper's plain loss. What adapters can learn is
    on the subject: less of the rest is less noise in their gradients."""
    seed: int = 0
    """All random numbers follow from it."""

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a batch, on the CPU."""

    noise: Tensor
    """[B, C, h, w]."""
    timesteps: Tensor
    """[B]."""
    drop_text: Tensor
    """[B], True where the caption is left out."""
    drop_image: Tensor
    """[B], True where patch features are."""

    def __getitem__(self, rows: slice) -> Draws:
        """Those of some of the batch's rows."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class ExamplePreparer:
    """A pair becomes a training example, on a CPU worker; holds no model weights and pickles small."""

    def __init__(
        self,
        *,
        tokenizer: CLIPTokenizer,
        image_size: int,
        latent_size: int,
        encoder_size: int,
        augmentation: Augmentation,
        with_pixels: bool = True,
    ) -> None:
        """`with_pixels=False` leaves out pixel_values, which a training on precomputed latents does not need."""
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.latent_size = latent_size
        self.encoder_size = encoder_size
        self.augmentation = augmentation
        self.with_pixels = with_pixels

    @classmethod
    def for_model(cls, base: str, image_encoder: str) -> ExamplePreparer:
        """With the usual augmentation, and sizes and tokenizer from the folders (or hub names) of the models."""
        folder, clip = locate(base), locate(image_encoder)
        try:
            unet = json.loads((folder / "unet" / "config.json").read_text())
            vae = json.loads((folder / "vae" / "config.json").read_text())
            vision = json.loads((clip / "config.json").read_text())
            tokenizer = load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"{folder} or {clip} cannot be read ({error}); name model folders") from error
        return cls(
            tokenizer=tokenizer,
            image_size=unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            latent_size=unet["sample_size"],
            encoder_size=vision.get("vision_config", vision)["image_size"],
            augmentation=Augmentation(),
        )

    def __call__(
        self,
        *,
        image: Image.Image,
        mask: Image.Image,
        caption: str,
        noun: str,
        rng: np.random.Generator,
        scene: tuple[Image.Image, Image.Image] | None = None,
    ) -> dict[str, NDArray[np.generic]]:
        """The target is the picture as it is; the reference its subject: masked, cropped, heavily augmented.

        `scene` is another picture with its mask: the subject is put before it instead of on black. `caption` holds
        "{subject}" once. Returns pixel_values [3, H, W], reference_pixels [3, s, s] and subject_mask
        [1, h, w], the share of each latent pixel that the subject covers, as bytes that `unpacked` makes numbers of;
        input_ids [T], bare_ids [T] ("V̂ noun" alone), and the position of V̂ in both [].
        """
        picture = image.convert("RGB")
        reference = self._reference(picture, mask, scene, rng)
        covered = mask.convert("L").resize((self.latent_size,) * 2, Image.Resampling.BOX)
        ids, position = tokenize_subject(self.tokenizer, expand(caption, noun))
        bare_ids, bare_position = tokenize_subject(self.tokenizer, expand(SUBJECT_FIELD, noun))
        pixels: dict[str, NDArray[np.generic]] = {}
        if self.with_pixels:
            pixels["pixel_values"] = resize_to_bytes(picture, self.image_size)
        return pixels | {
            "subject_mask": np.array(covered)[None],
            "reference_pixels": resize_to_bytes(reference, self.encoder_size),
            "input_ids": np.array(ids, np.int64),
            "placeholder_position": np.array(position, np.int64),
            "bare_ids": np.array(bare_ids, np.int64),
            "bare_position": np.array(bare_position, np.int64),
        }

    def _reference(
        self,
        picture: Image.Image,
        mask: Image.Image,
        scene: tuple[Image.Image, Image.Image] | None,
        rng: np.random.Generator,
    ) -> Image.Image:
        if scene is None:
            return augment(mask_background(*crop_subject(picture, mask)), rng, settings=self.augmentation)
        placed = replace_background(picture, mask, *scene)
        cropped, silhouette = crop_subject(placed, mask, looseness=rng.random())
        return augment(cropped, rng, settings=self.augmentation, mask=silhouette)


def unpacked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of examples, its bytes as numbers: pixel_values in −1 … 1, reference_pixels and subject_mask in 0 … 1."""
    shares = {name: batch[name].float() / 255 for name in PACKED if name in batch}
    if "pixel_values" in shares:
        shares["pixel_values"] = shares["pixel_values"] * 2 - 1
    return {**batch, **shares}


def draw(base: BaseModel, config: AdapterTrainingConfig, rows: int, generator: Generator) -> Draws:
    """Random numbers for so many rows, from a CPU generator."""
    side = int(base.unet.config.sample_size)
    noise = torch.randn((rows, int(base.unet.config.in_channels), side, side), generator=generator)
    timesteps = draw_timesteps(rows, base.schedule, generator)
    drop_text = torch.rand(rows, generator=generator) < config.text_dropout
    drop_image = torch.rand(rows, generator=generator) < config.image_dropout
    drop_both = torch.rand(rows, generator=generator) < config.both_dropout
    return Draws(noise=noise, timesteps=timesteps, drop_text=drop_text | drop_both, drop_image=drop_image | drop_both)


class AdapterObjective(nn.Module):
    """The loss of a batch, with all that it is computed by; TrainingSession averages its gradients over workers."""

    def __init__(self, booth: Personalizer, config: AdapterTrainingConfig) -> None:
        super().__init__()
        self.booth = booth
        self.config = config
        self.trained = booth.trained
        self.trained.requires_grad_(True).train()
        write_out_attention(booth.base.unet, booth.base.text_encoder)

    def forward(self, batch: dict[str, Tensor], randomness: Generator | Draws) -> Tensor:
        """Mean denoising loss of a batch of examples; all randomness is given, on the CPU, or drawn from a generator.

        Latents may be given as `latents` (scaled) in place of `pixel_values`, and the text encoder's output for the
        captions as `prompt_embeds`.
        """
        base = self.booth.base
        with torch.no_grad():
            latents = batch["latents"] if "latents" in batch else base.encode_pixels(batch["pixel_values"])
        latents = latents.to(base.device)
        global_features, tokens = self.booth.image_encoder(batch["reference_pixels"].to(base.device))
        draws = randomness if isinstance(randomness, Draws) else draw(base, self.config, len(latents), randomness)
        noisy, target = add_noise(latents, draws.noise.to(base.device), draws.timesteps, base.schedule)
        concept_embeddings, patch_features = self.trained.encoders(global_features, tokens)
        prompt_embeds = self._prompt_embeds(batch, draws.drop_text, concept_embeddings)
        scale = (~draws.drop_image).to(base.device, noisy.dtype).view(-1, 1, 1)
        references = References(scale=scale, patch_features=patch_features)
        prediction = base.unet(
            noisy,
            draws.timesteps.to(base.device),
            prompt_embeds,
            cross_attention_kwargs=adapter_kwargs(references),
        ).sample
        weights = subject_weights(batch["subject_mask"].to(base.device), self.config.background_weight)
        return denoising_loss(prediction, target, weights)

    def draw_at(self, positions: Tensor) -> Draws:
        """Random numbers of the samples at these positions of the training: each depends on its own position alone."""
        generators = [Generator().manual_seed(seed_of(self.config.seed, each)) for each in positions.tolist()]
        draws = [draw(self.booth.base, self.config, 1, generator) for generator in generators]
        return Draws(**{part.name: torch.cat([getattr(each, part.name) for each in draws]) for part in fields(Draws)})

    def fixed_draws(self, rows: int, timestep: int) -> Draws:
        """The same noise every time, one timestep for all rows, nothing left out: for comparing losses."""
        draws = draw(self.booth.base, self.config, rows, Generator().manual_seed(timestep))
        none = torch.zeros(rows, dtype=torch.bool)
        return replace(draws, timesteps=torch.full((rows,), timestep), drop_text=none, drop_image=none)

    def _prompt_embeds(self, batch: dict[str, Tensor], drop_text: Tensor, concept_embeddings: Tensor) -> Tensor:
        positions = torch.where(drop_text, batch["bare_position"].cpu(), batch["placeholder_position"].cpu())
        if "prompt_embeds" not in batch:
            ids = torch.where(drop_text[:, None], batch["bare_ids"].cpu(), batch["input_ids"].cpu())
            return self.booth.prompt_embeds(ids, positions, concept_embeddings)
        with torch.no_grad():
            prompt_embeds = batch["prompt_embeds"].to(self.booth.base.device, copy=True)
            if drop_text.any():
                bare = self.booth.base.encode_text(batch["bare_ids"].cpu()[drop_text])
                prompt_embeds[drop_text.to(prompt_embeds.device)] = bare.to(prompt_embeds.dtype)
        return inject(prompt_embeds, positions.to(prompt_embeds.device), concept_embeddings)

    def gates(self) -> dict[str, float]:
        """|tanh γ| of every adapter, by layer."""
        gates = {layer: adapter.get_parameter("gate") for layer, adapter in self.trained.adapters.items()}
        return {layer: float(gate.detach().tanh().abs()) for layer, gate in gates.items()}


def seed_of(seed: int, number: int) -> int:
    """A seed of torch's for one sample or step of a training: neighbours in seed or number share nothing."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


def optimizer_for(objective: AdapterObjective, config: AdapterTrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters: one group for the adapters, one for the encoders, as in the paper."""
    groups = [
        {"params": list(objective.trained.adapters.parameters()), "lr": config.adapter_learning_rate},
        {"params": list(objective.trained.encoders.parameters()), "lr": config.encoder_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.99))
