"""Methods by subjects, as Ray tasks: what is finished stays finished, and only the rest is worked on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import ray
import torch

from instantbooth import Personalizer
from instantbooth.errors import ParameterError
from instantbooth.evaluation.cases import Case
from instantbooth.evaluation.cells import Cell, Cells, evaluate
from instantbooth.evaluation.methods.interface import Method
from instantbooth.evaluation.methods.registry import METHODS, Parts
from instantbooth.machine import machine
from instantbooth.model import weights
from instantbooth.model.base import anywhere
from instantbooth.storage import absolute_uri, open_store
from jobs import cli
from jobs.cluster import ray_cluster
from jobs.evaluation.protocol import Protocol
from jobs.tracked import revision

DIGEST_LENGTH = 12
folder_digest = lru_cache(weights.folder_digest)
"""Entrants share their models."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A method with the models and settings it enters with."""

    label: str
    """How results call it; a method may enter several times."""
    method: str
    """One of METHODS."""
    parts: Parts

    @property
    def digest(self) -> str:
        """Of all that its pictures depend on, but the case."""
        own, folders = self.parts.settings.of(self.method), METHODS[self.method].folders(self.parts)
        named = [asdict(own), asdict(self.parts.sampling), [folder_digest(folder) for folder in folders]]
        if self.parts.personalizer is not Personalizer:
            named.append(self.parts.personalizer.__name__)
        return sha256(json.dumps(named).encode()).hexdigest()[:DIGEST_LENGTH]


def sweep(protocol: Protocol, entrants: Sequence[Entrant]) -> dict[str, list[Cell]]:
    """The cells of every entrant, subject by subject; those that are missing are made on the cluster.

    A task's InputError or WeightsError is raised as itself. ParameterError where the cluster cannot run a task.
    """
    if tasks := missing(protocol, entrants):
        with ray_cluster():
            _run(protocol, tasks)
    cases = protocol.cases
    kept = {each.label: _cells(protocol.output, each.method, each.digest) for each in entrants}
    return {label: [cells.read(case) for case in cases] for label, cells in kept.items()}


def missing(protocol: Protocol, entrants: Sequence[Entrant]) -> list[tuple[Entrant, int]]:
    """Entrants and the places of the subjects whose cells are not made yet."""
    cases = protocol.cases
    kept = [(each, _cells(protocol.output, each.method, each.digest)) for each in entrants]
    return [(each, number) for each, cells in kept for number, case in enumerate(cases) if not cells.has(case)]


def _run(protocol: Protocol, tasks: Sequence[tuple[Entrant, int]]) -> None:
    _check_resources(protocol)
    task = _evaluate.options(num_cpus=protocol.cpus, num_gpus=protocol.gpus)
    share = f"{protocol.gpus:g} GPUs" if protocol.gpus else f"{protocol.cpus:g} logical CPUs"
    output, code = absolute_uri(protocol.output), revision()
    cases = {number: ray.put(protocol.cases[number]) for number in {number for _, number in tasks}}
    running = [
        task.remote(
            cases[number], each.method, _absolute_parts(each.parts), each.digest, output=output, share=share, code=code
        )
        for each, number in tasks
    ]
    done: list[str] = []
    with cli.following("evaluating", len(tasks), lambda: (len(done), done[-1] if done else "")):
        while running:
            finished, running = ray.wait(running)
            done += ray.get(finished)


@ray.remote
def _evaluate(case: Case, name: str, parts: Parts, digest: str, *, output: str, share: str, code: str) -> str:
    """Makes one cell and keeps it."""
    if parts.device == "cpu":
        # Tasks run side by side: more threads than cores starve each other.
        torch.set_num_threads(1)
    cell = evaluate(_method(name, parts), case, machine=f"{machine(parts.device)}, {share} a subject", code=code)
    _cells(output, name, digest).write(case, cell)
    return f"{METHODS[name].title}, {case.name}"


@lru_cache(maxsize=1)
def _method(name: str, parts: Parts) -> Method[Any]:
    """A worker process builds a method once for all the subjects it is given in a row."""
    return METHODS[name].build(parts)


def _cells(output: str, name: str, digest: str) -> Cells:
    return Cells(store=open_store(output), method=name, digest=digest)


def _absolute_parts(parts: Parts) -> Parts:
    """The same from any working directory: workers of a submitted job start in folders of their own."""
    named = {name: anywhere(value) for name, value in vars(parts.models).items() if isinstance(value, str)}
    encoder = anywhere(parts.ip_adapter_image_encoder)
    return replace(parts, models=replace(parts.models, **named), ip_adapter_image_encoder=encoder)


def _check_resources(protocol: Protocol) -> None:
    """A task that no machine can hold would wait for ever."""
    wanted = {"CPU": protocol.cpus, "GPU": protocol.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ParameterError(
            f"a subject is to take {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, the cluster's machines have "
            f"{there}; pass --cpus or --gpus with less"
        )
