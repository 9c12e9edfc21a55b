"""Why a row, or one of its pictures, cannot be made; and what is no fault of theirs."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import torch

from instantbooth.errors import InstantBoothError, OverloadedError, TransientStorageError

log = logging.getLogger("instantbooth.personalize")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong."""

    code: str
    """The error's name: image, missing_object, prompt, …"""
    message: str
    transient: bool = False
    """Whether it says nothing of the row, as where a store does not answer: it stays open, for the next run."""

    @classmethod
    def of(cls, error: Exception, *, transient: bool = False) -> Failure:
        """The failure behind an error; transient in any case where a store did not answer or the engine was full."""
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
        transient = transient or isinstance(error, TransientStorageError | OverloadedError)
        return cls(code=words, message=str(error), transient=transient)


def judged(error: Exception, device: torch.device) -> Failure:
    """The failure of the row that met with this error on the device, which `leave_a_dead_device` looks at first."""
    if not isinstance(error, InstantBoothError):
        leave_a_dead_device(device, error)
    return Failure.of(error)


def leave_a_dead_device(device: torch.device, error: Exception) -> None:
    """Ends this process where its device no longer computes.

    Every row after this one would fail there. Ray Data replaces an actor that exits, and repeats its batch.
    """
    if not _computes(device):
        log.critical("%s no longer computes: this worker ends, and its rows are repeated (%r)", device, error)
        os._exit(1)


def _computes(device: torch.device) -> bool:
    try:
        return (torch.ones(1, device=device) + 1).item() == 2
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False
