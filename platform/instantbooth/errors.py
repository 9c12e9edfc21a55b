"""Everything that can go wrong, as one tree.

    InstantBoothError
    ├── InputError              what a user handed over
    │   ├── ImageError            a picture that cannot be used
    │   ├── PromptError           a prompt that cannot be used
    │   ├── ParameterError        a number or name out of its range
    │   └── ManifestError         a row of work that cannot be used
    ├── WeightsError            weights missing, damaged or of another shape
    │   └── BaseModelError        a folder that is not a Stable Diffusion model
    ├── ConceptError            a concept file damaged, or made by other encoders
    ├── StorageError            an object that cannot be read or written
    │   ├── MissingObjectError    there is no such object
    │   ├── OversizedObjectError  an object with more bytes than are read
    │   ├── TransientStorageError the store did not answer, or not now: the same call may work later
    │   └── ConditionalWriteError a store that replaces objects which a conditional write must leave alone
    ├── TrainingError           a training that cannot go on
    │   └── StoppedError          it was asked to stop, and saved what it had
    ├── TrackingError           MLflow could not be had
    ├── PictureError            a picture that came out unusable
    └── EngineError             a request that was not denoised
        ├── OverloadedError       there are too many before it
        └── DeadlineError         its time ran out

Messages name the value, the rule and the fix. Every exception carries its message alone and so survives pickling.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InstantBoothError(Exception):
    """Base of every error raised on purpose by this project."""


class InputError(InstantBoothError, ValueError):
    """What a user handed over cannot be used."""


class ImageError(InputError):
    """A picture or mask that cannot be decoded or used."""


class PromptError(InputError):
    """A prompt whose placeholder is missing, doubled or cut off."""


class ParameterError(InputError):
    """A parameter of the wrong type, out of its range, or an unknown name."""


class ManifestError(InputError):
    """A manifest, or a row of one, that breaks a rule."""


class WeightsError(InstantBoothError):
    """Weights that are missing, damaged, or do not fit the model."""


class BaseModelError(WeightsError):
    """A folder that does not hold a usable Stable Diffusion model."""


class ConceptError(InstantBoothError):
    """A concept that is damaged or was made by other encoders."""


class StorageError(InstantBoothError):
    """An object that cannot be read or written."""


class MissingObjectError(StorageError):
    """An object that does not exist; the store itself answered."""


class OversizedObjectError(StorageError):
    """An object with more bytes than its reader takes."""


class TransientStorageError(StorageError):
    """A store that did not answer, or refused for now; a write may have taken place all the same."""


class ConditionalWriteError(StorageError):
    """A store that does not honour conditional writes, and so cannot commit work exactly once."""


class TrainingError(InstantBoothError):
    """A training that cannot go on, or cannot continue the run it was given."""


class StoppedError(TrainingError):
    """A training that was asked to stop; the same command goes on from its checkpoint."""


class TrackingError(InstantBoothError):
    """The tracking server did not answer, or refused."""


class PictureError(InstantBoothError):
    """A picture that is not finite: the same request would make it again."""


class EngineError(InstantBoothError):
    """A request that the engine did not finish."""


class OverloadedError(EngineError):
    """The engine holds as many requests as it may: come back later."""


class DeadlineError(EngineError):
    """The request was not finished by its deadline."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that lists the known names, led by the nearest one.

    >>> did_you_mean("sd51", ["miniature", "sd15"])
    "Did you mean 'sd15'? Known: miniature, sd15."
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    suggestion = f"Did you mean '{nearest[0]}'? " if nearest else ""
    return f"{suggestion}Known: {', '.join(names)}."
