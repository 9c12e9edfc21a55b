"""What is found out before any row is worked on: whether storage and cluster are what the job needs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import ray

from instantbooth.errors import ConditionalWriteError, MissingObjectError, ParameterError
from instantbooth.ledger import SELF_TEST, Ledger
from instantbooth.storage import ObjectStore, open_store, patiently
from pipelines.plan import CONCEPTS

FETCHING_CPUS = 1
"""What a task that fetches references takes."""

log = logging.getLogger("instantbooth.personalize")


class Wanted(Protocol):
    """Actors of one stage at the start, each of which takes a CPU besides its GPUs."""

    @property
    def min(self) -> int: ...

    @property
    def gpus(self) -> float: ...


def check_store(store: ObjectStore, *, allow_unconditional: bool) -> bool:
    """Whether the store honours conditional writes. ConditionalWriteError where it must and does not."""
    try:
        Ledger(store).check_store()
        return True
    except ConditionalWriteError as error:
        if not allow_unconditional:
            raise ConditionalWriteError(
                f"{error}; or pass --allow-unconditional, and see to it that one run at a time writes there"
            ) from error
        log.warning("NOT EXACTLY ONCE: %s", error)
        return False


def check_concepts(uri: str) -> None:
    """Raises StorageError where an earlier output is not there or cannot be read: every row would meet with that."""
    store = open_store(uri)
    if not patiently(lambda: store.exists(SELF_TEST) or next(store.list(f"{CONCEPTS}/"), None)):
        raise MissingObjectError(f"{uri} is no earlier output and has no {CONCEPTS}/; correct --concepts, or omit it")


def check_actors(actors: int, gpus_per_actor: float) -> None:
    """Raises ParameterError where the cluster lacks what so many actors, and a task that feeds them, take."""
    have = ray.cluster_resources()
    if (gpus := gpus_for([gpus_per_actor] * actors)) > have.get("GPU", 0):
        raise ParameterError(
            f"{actors} actors of {gpus_per_actor:g} GPU each ask for {gpus} GPU, none on two at once; the cluster has "
            f"{have.get('GPU', 0):g}; lower actors or gpus_per_actor"
        )
    if actors + 1 > have.get("CPU", 0):
        raise ParameterError(
            f"{actors} actors of one CPU each, and a task that reads for them, ask for {actors + 1} CPU; the cluster "
            f"has {have.get('CPU', 0):g}; lower actors"
        )


def gpus_for(shares: Iterable[float]) -> int:
    """GPUs on which actors with these shares of one find room, the largest placed first: no share lies on two."""
    free: list[float] = []
    for share in sorted(filter(None, shares), reverse=True):
        # Ray counts in ten thousandths.
        place = next((number for number, room in enumerate(free) if room > share - 1e-4), None)
        if place is None:
            free.append(1 - share)
        else:
            free[place] -= share
    return len(free)


def check_cluster(concept: Wanted, diffusion: Wanted) -> None:
    """Raises ParameterError where the cluster lacks what the pools start with: Ray would wait for it in silence."""
    have = ray.cluster_resources()
    gpus = gpus_for([concept.gpus] * concept.min + [diffusion.gpus] * diffusion.min)
    if gpus > have.get("GPU", 0):
        raise ParameterError(
            f"the pools start with {concept.min} actors of {concept.gpus:g} GPU and {diffusion.min} of "
            f"{diffusion.gpus:g}, none on two at once, which takes {gpus} GPU; the cluster has "
            f"{have.get('GPU', 0):g}; lower concept.gpus, diffusion.gpus or min"
        )
    cpus = concept.min + diffusion.min + FETCHING_CPUS
    if cpus > have.get("CPU", 0):
        raise ParameterError(
            f"the pools start with {concept.min} + {diffusion.min} actors of one CPU each, and fetching takes "
            f"{FETCHING_CPUS} more; the cluster has {have.get('CPU', 0):g}; lower concept.min or diffusion.min"
        )
