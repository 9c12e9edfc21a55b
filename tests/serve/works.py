"""Works and stored concepts, for tests of the parts."""

from __future__ import annotations

from dataclasses import replace

from instantbooth import Concept
from serve.concepts import ConceptStore
from serve.messages import Encoded, Work
from serve.schemas import ImageParameters


def a_work(*, concept_id: str | None = None, concept: bytes | None = None, deadline_s: float | None = None) -> Work:
    """A picture of a concept of ada's, in eight steps."""
    body = ImageParameters(prompt="a photo of a {subject}", num_inference_steps=8)
    work = Work.of("ada", body, seed=0, deadline_s=deadline_s, concept=concept, progress=True)
    return replace(work, concept_id=concept_id)


def stored(store: ConceptStore, concept: Concept, ttl_s: int = 60) -> str:
    """The id of a concept of ada's."""
    encoded = Encoded(data=concept.to_bytes(), digest=concept.digest, num_images=concept.num_images)
    return store.add("ada", encoded, class_noun="person", name=None, consent=None, ttl_s=ttl_s).id
