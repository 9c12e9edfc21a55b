"""Why a row, or one of its pictures, cannot be made; and what is no fault of theirs."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

import torch

from instantbooth.errors import (
    InstantBoothError,
    MissingObjectError,
    OverloadedError,
    OversizedObjectError,
    StorageError,
)

log = logging.getLogger("instantbooth.personalize")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong."""

    code: str
    """The error's name: image, missing_object, prompt, …"""
    message: str
    transient: bool = False
    """Whether it says nothing of the row, as where a store refuses access: it stays open, for the next run."""

    @classmethod
    def of(cls, error: Exception, *, transient: bool = False) -> Failure:
        """The failure behind an error; transient in any case that `_says_nothing_of_a_row` knows."""
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
        return cls(code=words, message=str(error), transient=transient or _says_nothing_of_a_row(error))


def judged(error: Exception, device: torch.device, *, transient: bool = False) -> Failure:
    """The failure of the row that met with this error on the device, which `leave_a_dead_device` looks at first."""
    if not isinstance(error, InstantBoothError):
        leave_a_dead_device(device, error)
    return Failure.of(error, transient=transient)


def lacks_device_memory(error: Exception) -> bool:
    """Whether torch found no room; for a CPU's memory it has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def leave_a_dead_device(device: torch.device, error: Exception) -> None:
    """Ends this process where its device no longer computes.

    Every row after this one would fail there. Ray Data replaces an actor that exits, and repeats its batch.
    """
    if not _computes(device):
        log.critical("%s no longer computes: this worker ends, and its rows are repeated (%r)", device, error)
        os._exit(1)


def _says_nothing_of_a_row(error: Exception) -> bool:
    """Whether the machine is short of memory, the engine was full, or a store did not give what may well be there.

    Credentials that have expired or a photo that may not be read: what is settled stays so for good, and these pass.
    """
    if isinstance(error, StorageError):
        return not isinstance(error, MissingObjectError | OversizedObjectError)
    return isinstance(error, OverloadedError | MemoryError)


def _computes(device: torch.device) -> bool:
    try:
        return (torch.ones(1, device=device) + 1).item() == 2
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False
