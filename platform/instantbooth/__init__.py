"""InstantBooth: a few photos of a person or a cat become a concept, and the concept appears in any prompted scene.

>>> from instantbooth import Concept, Personalizer                                           # doctest: +SKIP
>>> booth = Personalizer.from_pretrained("miniature")                                        # doctest: +SKIP
>>> concept = booth.encode(images, class_noun="person")                                      # doctest: +SKIP
>>> pictures = booth.generate(["a photo of a {subject} at the beach"], concept, seed=7)      # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instantbooth.model.conditioning import Concept
    from instantbooth.model.personalizer import Personalizer

__all__ = ["Concept", "Personalizer"]


def __getattr__(name: str) -> Any:
    """Loads torch and diffusers when the model is first asked for, not on import."""
    if name == "Concept":
        from instantbooth.model.conditioning import Concept

        return Concept
    if name == "Personalizer":
        from instantbooth.model.personalizer import Personalizer

        return Personalizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
