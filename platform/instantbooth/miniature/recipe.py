"""The miniature world from nothing: every model in it, stage by stage, each checkpointed and resumed.

corpora → vae → segmenter, clip, judges → diffusion → refinement → adapters → backgrounds → decoder → scales
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from instantbooth.config import GenerationDefaults
from instantbooth.errors import ParameterError
from instantbooth.evaluation.miniature import Examination, choose_scales, draw_subjects
from instantbooth.machine import machine
from instantbooth.miniature import clip, judging, segmenter
from instantbooth.miniature.autoencoder import psnr, train_decoder, train_vae
from instantbooth.miniature.corpus import Corpus, render_corpus
from instantbooth.miniature.diffusion import (
    Captioned,
    new_scheduler,
    new_text_encoder,
    new_unet,
    train_diffusion,
)
from instantbooth.miniature.pairs import Pairs, corpus_latents, loop_of
from instantbooth.miniature.vocabulary import learn_tokenizer
from instantbooth.model.personalizer import Personalizer
from instantbooth.model.record import RECORD, write_record
from instantbooth.presets import miniature_preset
from instantbooth.prompts import PLACEHOLDER_TOKEN, SUBJECT_FIELD, expand, insert_field, tokenize_subject
from instantbooth.training.adapters import AdapterObjective, AdapterTrainingConfig, Draws, draw
from instantbooth.training.loop import LoopConfig, last_loss, train

BEGUN = "begun"
"""Where the record keeps the stage that is under way, and its seconds so far."""
"""What made the models beside it, stage by stage."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much of everything. The defaults are 4.5 hours' work for two cores."""

    pretraining_pictures: int = 16_000
    """Text-image pairs, each of an identity of its own, for all models but the judges."""
    later_pictures: int = 32_000
    """The same pairs and new ones, for the base's refinement."""
    adapter_pictures: int = 32_000
    """The first of these, for the adapters."""
    judging_identities: int = 3_000
    """Identities the judges learn from, six pictures each."""
    held_out_identities: int = 200
    """Identities the judges are checked on, six pictures each."""
    vae: LoopConfig = LoopConfig(
        steps=2800, learning_rate=1.5e-3, decay_steps=400, ema_decay=0.995, batch_size=16, processes=2
    )
    decoder: LoopConfig | None = None
    """The VAE's decoder once more, at the end: finer faces from the same latents. None leaves it."""
    segmenter: LoopConfig = segmenter.TRAINING
    clip: LoopConfig = clip.TRAINING
    attribute_judge: LoopConfig = judging.ATTRIBUTE_TRAINING
    identity_judge: LoopConfig = judging.IDENTITY_TRAINING
    diffusion: LoopConfig = LoopConfig(
        steps=7000,
        learning_rate=8e-4,
        warmup_steps=200,
        decay_steps=1200,
        ema_decay=0.998,
        batch_size=32,
        processes=2,
    )
    refinement: LoopConfig = LoopConfig(
        steps=6000,
        learning_rate=5e-4,
        decay_steps=6000,
        ema_decay=0.998,
        batch_size=32,
        processes=2,
        seed=1,
    )
    """The base again, from its averaged weights: a fresh optimizer, and the rate falls all the way."""
    adapters: AdapterTrainingConfig = AdapterTrainingConfig(
        steps=6000, adapter_learning_rate=1.2e-3, encoder_learning_rate=1.2e-3, background_weight=0.25
    )
    backgrounds: AdapterTrainingConfig = AdapterTrainingConfig(
        steps=1500,
        adapter_learning_rate=8e-4,
        encoder_learning_rate=8e-4,
        replaced_backgrounds=0.5,
        background_weight=0.25,
        seed=1,
    )
    """The adapters again, from their averaged weights, with references that are not all masked. Trained so from the
    beginning, they identify fewer subjects."""
    defaults: GenerationDefaults = GenerationDefaults(
        adapter_scale=1.0, concept_scale=1.0, guidance_scale=2.0, num_inference_steps=25
    )
    """Sampling parameters; α and β are chosen on validation identities at the end, starting at these."""
    validation_subjects: int = 50
    """Identities, with four prompts each, on which the scales are chosen."""

    @property
    def rounds(self) -> tuple[AdapterTrainingConfig, ...]:
        """All that the adapters are trained by, in order."""
        return self.adapters, self.backgrounds


GPU = Recipe(
    later_pictures=96_000,
    decoder=LoopConfig(
        steps=3600, learning_rate=8e-4, decay_steps=3600, ema_decay=0.995, batch_size=16, processes=2, seed=1
    ),
    diffusion=LoopConfig(steps=1000, learning_rate=1.2e-3, warmup_steps=200, ema_decay=0.998, batch_size=768),
    refinement=LoopConfig(steps=4250, learning_rate=1.2e-3, decay_steps=3187, ema_decay=0.998, batch_size=768, seed=1),
    adapters=replace(Recipe().adapters, steps=7500),
)
"""A base that has seen nine times as much, in ten minutes of a GPU. It made the shipped weights."""
RECIPES = {"cpu": Recipe(), "gpu": GPU}

Stage = Callable[["Workshop"], dict[str, float]]


class Workshop:
    """A folder in which the stages leave their results: corpora, checkpoints, and the models in their formats."""

    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        self.folder = folder
        self.recipe = recipe
        self.device = device
        self.checkpoints = folder / "checkpoints"
        self.models = folder / "models"

    def corpus(self) -> Corpus:
        """The first text-image pairs."""
        return render_corpus("pretraining", self.recipe.pretraining_pictures, 1, self.folder / "corpora")

    def later_corpus(self) -> Corpus:
        """The text-image pairs of the base's refinement."""
        return render_corpus("pretraining", self.recipe.later_pictures, 1, self.folder / "corpora")

    def adapter_corpus(self) -> Corpus:
        """The text-image pairs of the adapters."""
        return render_corpus("pretraining", self.recipe.adapter_pictures, 1, self.folder / "corpora")

    def judging_corpus(self, split: str, identities: int) -> Corpus:
        """Six pictures of each identity."""
        return render_corpus(split, identities, 6, self.folder / "corpora")

    def held_out(self) -> Corpus:
        """Pictures no training has seen, to check everything but the judges on."""
        return render_corpus("validation", 512, 1, self.folder / "corpora")

    def tokenizer(self) -> CLIPTokenizer:
        """One vocabulary for base and CLIP."""
        path = self.models / "base" / "tokenizer"
        if not path.exists():
            corpus = self.corpus()
            words = [*corpus.captions, *corpus.descriptions, *(f"a picture of a {noun} with" for noun in corpus.nouns)]
            learn_tokenizer(words, placeholder=PLACEHOLDER_TOKEN).save_pretrained(path)
        return CLIPTokenizer.from_pretrained(path)

    def vae(self) -> AutoencoderKL:
        """The trained one."""
        vae: AutoencoderKL = AutoencoderKL.from_pretrained(self.models / "base" / "vae")
        return vae.to(self.device).eval()

    def latents(self, corpus: Corpus) -> Tensor:
        """Scaled latents of a corpus, encoded once."""
        return corpus_latents(corpus, self.vae(), self.folder / "corpora")

    def captioned(self, corpus: Corpus) -> Captioned:
        """What the base learns from."""
        return Captioned(corpus, self.latents(corpus), self.tokenizer(), placeholder=PLACEHOLDER_TOKEN)


def build(folder: Path, recipe: Recipe, *, device: torch.device) -> dict[str, Any]:
    """Runs every stage that has not run yet, and those that need it; returns figures by stage.

    They are kept in models/RECORD.json. Raises ParameterError where a stage that has run was of another recipe.
    """
    workshop = Workshop(folder, recipe, device)
    record_path = workshop.models / RECORD
    record: dict[str, Any] = json.loads(record_path.read_text()) if record_path.exists() else {}
    _check_recipe(record, recipe, folder)
    record["made_by"] = {"command": _command(recipe), "recipe": asdict(recipe)}
    for name, stage in STAGES.items():
        if name not in record:
            for later in (each for each, needed in NEEDS.items() if name in needed):
                record.pop(later, None)
            before = record.setdefault(BEGUN, {}).setdefault(name, 0.0)
            write_record(workshop.models, record)
            torch.manual_seed(0)
            started = time.perf_counter()
            try:
                figures = stage(workshop)
            finally:
                record[BEGUN][name] = before + time.perf_counter() - started
                write_record(workshop.models, record)
            seconds = round(record.pop(BEGUN)[name])
            record[name] = {**figures, "seconds": seconds, "machine": machine(device), "torch": torch.__version__}
        write_record(workshop.models, record)
    return record


def _command(recipe: Recipe) -> str:
    named = (f"recipe:{name}" for name, known in RECIPES.items() if known == recipe)
    return f"python -m jobs.build_miniature {next(named, 'with this recipe')}"


def _check_recipe(record: dict[str, Any], recipe: Recipe, folder: Path) -> None:
    """What is recorded as the recipe must be what made the models, stages of earlier calls included."""
    asked = json.loads(json.dumps(asdict(recipe)))
    for stage in STAGES:
        for name in SETTINGS[stage] if stage in record or stage in record.get(BEGUN, {}) else ():
            made = record["made_by"]["recipe"].get(name)
            if made != asked[name]:
                raise ParameterError(
                    f"{folder} holds the stage {stage!r} with {name} {made}, asked is {asked[name]}; "
                    "repeat its options, or name another output folder"
                )


def _build_vae(shop: Workshop) -> dict[str, float]:
    recipe = shop.recipe
    vae = train_vae(shop.corpus(), recipe.vae, folder=shop.checkpoints, device=shop.device)
    vae.save_pretrained(shop.models / "base" / "vae")
    return {"psnr_db": psnr(vae, torch.from_numpy(shop.held_out().images))}


def _build_segmenter(shop: Workshop) -> dict[str, float]:
    config = shop.recipe.segmenter
    model = segmenter.train_segmenter(shop.corpus(), config, folder=shop.checkpoints, device=shop.device)
    model.save_pretrained(shop.models / "segmenter")
    segmenter.new_image_processor().save_pretrained(shop.models / "segmenter")
    held_out = shop.held_out()
    return {"mask_iou": segmenter.mask_iou(model, torch.from_numpy(held_out.images), torch.from_numpy(held_out.masks))}


def _build_clip(shop: Workshop) -> dict[str, float]:
    tokenizer = shop.tokenizer()
    model = clip.train_clip(
        shop.corpus(),
        tokenizer,
        shop.recipe.clip,
        folder=shop.checkpoints,
        device=shop.device,
    )
    model.save_pretrained(shop.models / "clip")
    tokenizer.save_pretrained(shop.models / "clip")
    clip.new_image_processor().save_pretrained(shop.models / "clip")
    return {"retrieval_top1_of_64": clip.retrieval_accuracy(model, tokenizer, shop.held_out())}


def _build_judges(shop: Workshop) -> dict[str, float]:
    recipe = shop.recipe
    corpus = shop.judging_corpus("judging", recipe.judging_identities)
    held_out = shop.judging_corpus("judging-held-out", recipe.held_out_identities)
    attributes = judging.train_attribute_judge(
        corpus,
        recipe.attribute_judge,
        folder=shop.checkpoints,
        device=shop.device,
    )
    attributes.save(shop.models / "judges" / "attributes")
    identity = judging.train_identity_judge(
        corpus,
        recipe.identity_judge,
        folder=shop.checkpoints,
        device=shop.device,
    )
    identity.save(shop.models / "judges" / "identity")
    accuracy = judging.attribute_accuracy(attributes, held_out)
    return {
        "attribute_accuracy": sum(accuracy.values()) / len(accuracy),
        **{f"accuracy_{name}": value for name, value in accuracy.items()},
        "verification_auc": judging.verification_auc(identity, held_out),
    }


def _build_diffusion(shop: Workshop) -> dict[str, float]:
    return _save_base(shop, *_first_round(shop))


def _refine_diffusion(shop: Workshop) -> dict[str, float]:
    text_encoder, unet, _ = _first_round(shop)
    pictures = shop.captioned(shop.later_corpus())
    config = shop.recipe.refinement
    losses = train_diffusion("refinement", text_encoder, unet, pictures, config, folder=shop.checkpoints)
    return _save_base(shop, text_encoder, unet, losses)


def _first_round(shop: Workshop) -> tuple[CLIPTextModel, UNet2DConditionModel, list[float]]:
    """Trained, or read from the checkpoint at its end."""
    text_encoder, unet = new_text_encoder(shop.tokenizer()).to(shop.device), new_unet().to(shop.device)
    pictures, config = shop.captioned(shop.corpus()), shop.recipe.diffusion
    losses = train_diffusion("diffusion", text_encoder, unet, pictures, config, folder=shop.checkpoints)
    return text_encoder, unet, losses


def _save_base(
    shop: Workshop, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, losses: list[float]
) -> dict[str, float]:
    StableDiffusionPipeline(
        vae=shop.vae(),
        text_encoder=text_encoder,
        tokenizer=shop.tokenizer(),
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(shop.models / "base")
    return {"loss": last_loss(losses)}


def _build_adapters(shop: Workshop) -> dict[str, float]:
    preset = miniature_preset(shop.models)
    booth = Personalizer.untrained(
        preset.base,
        image_encoder=preset.image_encoder,
        patch_layer=preset.patch_layer,
        defaults=shop.recipe.defaults,
        device=shop.device,
    )
    return _train_booth(shop, booth, "adapters", shop.recipe.adapters)


def _refine_adapters(shop: Workshop) -> dict[str, float]:
    return _train_booth(shop, _trained_booth(shop), "backgrounds", shop.recipe.backgrounds)


def _train_booth(shop: Workshop, booth: Personalizer, stage: str, config: AdapterTrainingConfig) -> dict[str, float]:
    corpus = shop.adapter_corpus()
    pairs = Pairs(corpus, shop.latents(corpus), replaced_backgrounds=config.replaced_backgrounds)
    losses = train_adapters(AdapterObjective(booth, config), pairs, name=stage, folder=shop.checkpoints)
    booth.save_weights(shop.models / "adapters")
    return {"loss": last_loss(losses)}


def _refine_decoder(shop: Workshop) -> dict[str, float]:
    config = shop.recipe.decoder
    if config is None:
        return {}
    vae, corpus = shop.vae(), shop.corpus()
    train_decoder(vae, corpus, shop.latents(corpus), config, folder=shop.checkpoints)
    vae.save_pretrained(shop.models / "base" / "vae")
    return {"psnr_db": psnr(vae, torch.from_numpy(shop.held_out().images))}


def _trained_booth(shop: Workshop) -> Personalizer:
    preset = miniature_preset(shop.models)
    booth = Personalizer.from_pretrained(
        preset.base, weights=preset.weights, image_encoder=preset.image_encoder, device=shop.device
    )
    booth.defaults = shop.recipe.defaults
    return booth


def _choose_scales(shop: Workshop) -> dict[str, float]:
    booth = _trained_booth(shop)
    exam = Examination(booth, shop.models / "judges", draw_subjects("validation", shop.recipe.validation_subjects))
    chosen = choose_scales(exam, report=lambda row: print(json.dumps(row)))
    booth.defaults = replace(
        booth.defaults, adapter_scale=chosen["adapter_scale"], concept_scale=chosen["concept_scale"]
    )
    booth.save_weights(shop.models / "adapters")
    return chosen


STAGES: dict[str, Stage] = {
    "vae": _build_vae,
    "segmenter": _build_segmenter,
    "clip": _build_clip,
    "judges": _build_judges,
    "diffusion": _build_diffusion,
    "refinement": _refine_diffusion,
    "adapters": _build_adapters,
    "backgrounds": _refine_adapters,
    "decoder": _refine_decoder,
    "scales": _choose_scales,
}

NEEDS: dict[str, tuple[str, ...]] = {
    "diffusion": ("vae",),
    "refinement": ("diffusion",),
    "adapters": ("clip", "refinement"),
    "backgrounds": ("adapters",),
    "decoder": ("vae",),
    "scales": ("judges", "backgrounds", "decoder"),
}
"""The stages whose results a stage starts from; the others start from renders alone."""


SETTINGS: dict[str, tuple[str, ...]] = {
    "vae": ("pretraining_pictures", "vae"),
    "segmenter": ("segmenter",),
    "clip": ("clip",),
    "judges": ("judging_identities", "held_out_identities", "attribute_judge", "identity_judge"),
    "diffusion": ("diffusion",),
    "refinement": ("later_pictures", "refinement"),
    "adapters": ("adapter_pictures", "adapters"),
    "backgrounds": ("backgrounds",),
    "decoder": ("decoder",),
    "scales": ("defaults", "validation_subjects"),
}
"""The fields of the recipe that decide a stage, beside those of the stages before it."""


def train_adapters(
    objective: AdapterObjective,
    pairs: Pairs,
    *,
    name: str = "adapters",
    folder: Path,
    multiples: Mapping[nn.Parameter, float] | None = None,
) -> list[float]:
    """The method's training on one machine, from rendered pairs; leaves the averaged weights.

    `multiples` are of the learning rate, for parameters with another one; `name` is its checkpoint's in `folder`.
    Returns the loss of every step.
    """
    booth, config, corpus = objective.booth, objective.config, pairs.corpus
    captions = zip(corpus.captions, corpus.nouns, strict=True)
    subjects = [_tokenized(booth, insert_field(caption, noun), noun) for caption, noun in captions]
    bare = {noun: _tokenized(booth, SUBJECT_FIELD, noun) for noun in set(corpus.nouns)}

    def draw_batch(examples: int, generator: Generator) -> tuple[dict[str, Tensor], Draws]:
        rows, batch = pairs.draw(examples, generator)
        ids, positions = zip(*(subjects[row] for row in rows), strict=True)
        bare_ids, bare_positions = zip(*(bare[corpus.nouns[row]] for row in rows), strict=True)
        batch |= {
            "input_ids": torch.tensor(ids),
            "placeholder_position": torch.tensor(positions),
            "bare_ids": torch.tensor(bare_ids),
            "bare_position": torch.tensor(bare_positions),
        }
        return batch, draw(booth.base, config, examples, generator)

    def loss(drawn: tuple[dict[str, Tensor], Draws]) -> Tensor:
        value: Tensor = objective(*drawn)
        return value

    losses = train(
        name,
        objective,
        draw_batch,
        loss,
        loop_of(config),
        folder=folder,
        device=booth.base.device,
        multiples=multiples,
    )
    booth.trained.requires_grad_(False).eval()
    return losses


def _tokenized(booth: Personalizer, caption: str, noun: str) -> tuple[list[int], int]:
    return tokenize_subject(booth.base.tokenizer, expand(caption, noun))
