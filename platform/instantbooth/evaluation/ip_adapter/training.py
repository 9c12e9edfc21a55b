"""IP-Adapter's training: the denoising loss of pictures under their captions and the features of their subjects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instantbooth.evaluation.ip_adapter import weights
from instantbooth.model.base import BaseModel
from instantbooth.model.encoders import ImageEncoder
from instantbooth.model.objective import add_noise, denoising_loss, subject_weights
from instantbooth.prompts import tokenize
from instantbooth.training.adapters import AdapterTrainingConfig, Draws
from instantbooth.training.attention import write_out_attention


class IPAdapterObjective(nn.Module):
    """The loss of a batch; the base and the image encoder stay frozen."""

    def __init__(
        self, base: BaseModel, image_encoder: ImageEncoder, variant: str, config: AdapterTrainingConfig
    ) -> None:
        """Builds an untrained adapter into the base's U-Net. The encoder must read weights.PLUS_LAYER."""
        super().__init__()
        self.base = base
        self.image_encoder = image_encoder
        self.variant = variant
        self.config = config
        write_out_attention(base.unet, base.text_encoder)
        torch.manual_seed(config.seed)
        self.trained = weights.attach(base.unet, weights.new_state(base.unet, image_encoder, variant))
        self.trained.requires_grad_(True)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Mean loss of a batch, weighted as the config says.

        It has scaled `latents` [B, C, h, w], `reference_pixels` [B, 3, s, s], `subject_mask` [B, 1, h, w], the share of
        each latent pixel that the subject covers, and captions, `input_ids` [B, T].
        A caption left out is the empty one, as guidance has it; a picture left out has the features of none.
        """
        base = self.base
        latents = batch["latents"].to(base.device)
        noisy, target = add_noise(latents, draws.noise.to(base.device), draws.timesteps, base.schedule)
        with torch.no_grad():
            pixels = batch["reference_pixels"].to(base.device)
            features, nothing = weights.image_features(self.image_encoder, self.variant, pixels)
            empty = torch.tensor(tokenize(base.tokenizer, ""))
            ids = torch.where(draws.drop_text[:, None], empty, batch["input_ids"])
            prompt_embeds = base.encode_text(ids)
        dropped = draws.drop_image.to(base.device).view(-1, *[1] * (features.ndim - 1))
        features = torch.where(dropped, nothing, features)
        prediction = base.unet(
            noisy,
            draws.timesteps.to(base.device),
            prompt_embeds,
            added_cond_kwargs=weights.image_arguments(features[:, None]),
        ).sample
        weights_of_pixels = subject_weights(batch["subject_mask"].to(base.device), self.config.background_weight)
        return denoising_loss(prediction, target, weights_of_pixels)

    def state(self) -> weights.State:
        """The adapter's weights in the official format."""
        return weights.attached_state(self.base.unet)
