"""Requests as an endpoint gets them: of different subjects, with different references, steps and guidance."""

from __future__ import annotations

import numpy as np

from instantbooth import Concept, Personalizer
from instantbooth.miniature.corpus import class_noun_of, identity_of, subject_seed
from instantbooth.miniature.world import Scene, render
from instantbooth.model.personalizer import Request

REFERENCE_COUNTS = (1, 3, 5, 2, 1, 4)
"""Reference images of each subject."""
GUIDANCE = (1.0, 3.0, 3.0, 7.5)
"""Drawn for each request; at 1 it has one U-Net row, else two."""
PROMPTS = (
    "a photo of a {subject} at the beach",
    "a watercolor of a {subject} in the forest",
    "a photo of a {subject} wearing a crown in the snow",
)
LONG_STEPS = 500


class Workload:
    """Draws requests for subjects of the miniature world, whose concepts it makes once."""

    def __init__(self, booth: Personalizer, seed: int) -> None:
        self.booth = booth
        self.rng = np.random.default_rng(seed)
        self.concepts = [self._concept(number, count) for number, count in enumerate(REFERENCE_COUNTS)]

    def mixed(self, count: int, min_steps: int, max_steps: int) -> list[Request]:
        """Every parameter drawn anew for each request, the steps evenly from the range."""
        return [
            self._request(
                prompt=str(self.rng.choice(PROMPTS)),
                concept=self.concepts[self.rng.integers(len(self.concepts))],
                num_inference_steps=int(self.rng.integers(min_steps, max_steps + 1)),
                guidance_scale=float(self.rng.choice(GUIDANCE)),
                seed=number,
            )
            for number in range(count)
        ]

    def identical(self, count: int, steps: int) -> list[Request]:
        """The same guided request of three references, again and again."""
        return [self._request(num_inference_steps=steps)] * count

    def long(self) -> Request:
        """A guided request that runs until it is cancelled."""
        return self._request(num_inference_steps=LONG_STEPS)

    def _request(self, **changes: object) -> Request:
        usual: dict[str, object] = {"concept": self.concepts[1], "prompt": PROMPTS[0], "guidance_scale": 3.0, "seed": 0}
        usual |= {"sampler": "ddim"} | changes
        return self.booth.requests(usual.pop("prompt"), usual.pop("concept"), **usual)[0]

    def _concept(self, number: int, references: int) -> Concept:
        seed = subject_seed("demo", number)
        pictures = [render(identity_of(seed), Scene.sample(self.rng)) for _ in range(references)]
        images, masks = [each.image for each in pictures], [each.mask for each in pictures]
        return self.booth.encode(images, class_noun_of(seed), masks)
