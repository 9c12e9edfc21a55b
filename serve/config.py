"""What an operator chooses: the arguments of serve.app:build."""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from instantbooth.images import ImageLimits
from instantbooth.model.loading import Precision
from instantbooth.presets import tracking_uri
from serve.schemas import MAX_IMAGES

TENANT = r"[a-z0-9][a-z0-9-]{0,39}"
HASH = r"[0-9a-f]{64}"


class ServeConfig(BaseModel):
    """Model, store, keys and limits of one endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = "miniature"
    """Preset, or folder of a Stable Diffusion model within reach of every replica."""
    image_encoder: str | None = None
    """CLIP folder; the preset's, or the base folder's image_encoder/, if none is given."""
    weights: str | None = None
    """Weights folder, or a registered one such as models:/instantbooth@champion; the preset's if none is given."""
    segmenter: str | None = None
    """Segmentation model that finds subjects in photos without masks; the preset's if none is given."""
    precision: Precision = "fp32"
    """In which numbers the model computes. On GPUs bf16 is twice as fast or more. A concept is good in any of them."""
    tracking_uri: str = Field(default_factory=tracking_uri)
    """MLflow, for models:/ URIs. By default MLFLOW_TRACKING_URI."""
    store: str = "out/serve"
    """Where concepts, jobs and pictures are kept: a folder, file:// or s3://, the same for every replica."""
    keys: dict[str, list[str]] = {}
    """Tenant → SHA-256 of its API keys (`python -m serve.keys`). Without any, only this machine is served."""
    url_secret: str | None = Field(default=None, min_length=32)
    """Signs the urls of pictures; drawn at each start if none is given, so that older urls end then."""

    concept_ttl_s: int = Field(default=7 * 86400, ge=1)
    """How long a concept is kept where the client says nothing."""
    max_concept_ttl_s: int = Field(default=30 * 86400, ge=1)
    """How long one may be kept."""
    job_ttl_s: int = Field(default=86400, ge=1)
    """How long a job, its pictures and its idempotency key are kept."""
    url_ttl_s: int = Field(default=3600, ge=1)
    """How long the url of a picture works, and the picture is kept."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Seconds that a generation may take where the client says nothing."""

    row_budget: int | None = Field(default=None, ge=1)
    """U-Net rows in a step; None measures the knees of several sizes at start."""
    max_row_budget: int = Field(default=32, ge=1)
    """Largest number tried when measuring."""
    compile: bool = False
    """Whether diffusion replicas compile the U-Net, for the model's own size and every shape of its padded batches,
    before they are ready. Steps then take less time on GPUs, and a replica's start minutes."""
    max_requests: int = Field(default=256, ge=MAX_IMAGES)
    """Pictures that a diffusion replica holds, waiting ones included; beyond them the answer is 429. No fewer than one
    call may ask for."""
    max_pending_images: int = Field(default=32, ge=1)
    """Pictures that an ingress replica waits for; beyond them the answer is 429."""
    max_pending_uploads: int = Field(default=16, ge=1)
    """Uploads that an ingress replica waits for, and their encoding."""
    upload_s: float = Field(default=60.0, gt=0)
    """Seconds that the body of a call may take to arrive."""
    jobs_at_once: int = Field(default=4, ge=1)
    """Jobs that nobody waits for, denoised at a time for each diffusion replica; their tenants take turns."""
    max_jobs: int = Field(default=200, ge=1)
    """Unfinished jobs of a tenant, and as many calls with an Idempotency-Key."""

    max_body_bytes: int = Field(default=64_000_000, ge=1)
    """Size of a request."""
    max_image_bytes: int = Field(default=ImageLimits.max_bytes, ge=1)
    """Size of one uploaded picture."""
    max_image_pixels: int = Field(default=ImageLimits.max_pixels, ge=1)
    """Width times height of one."""
    image_hosts: list[str] = []
    """Hosts from which image_url may fetch; none unless named."""
    sweep_s: float = Field(default=5.0, gt=0)
    """How often diffusion replicas look whether concepts they hold were deleted."""
    clean_up_s: float = Field(default=60.0, gt=0)
    """How often what has expired is deleted from the store."""

    @field_validator("keys")
    @classmethod
    def _keys(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for tenant, hashes in value.items():
            if not re.fullmatch(TENANT, tenant):
                raise ValueError(f"a tenant is named by small letters, digits and hyphens, not {tenant!r}")
            if not hashes or not all(re.fullmatch(HASH, each) for each in hashes):
                raise ValueError(f"{tenant} needs SHA-256 hashes of 64 digits; make them with python -m serve.keys")
        return value

    @model_validator(mode="after")
    def _ttl(self) -> Self:
        if self.concept_ttl_s > self.max_concept_ttl_s:
            rule = f"concept_ttl_s must be at most max_concept_ttl_s ({self.max_concept_ttl_s})"
            raise ValueError(f"{rule}, is {self.concept_ttl_s}; lower it")
        return self
