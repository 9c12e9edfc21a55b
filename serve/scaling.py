"""Where a call goes, and how many replicas there are: Ray Serve asks these two."""

from __future__ import annotations

import math
from functools import partial
from hashlib import sha256
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

BUSIEST = 1.25
"""A replica is passed over once it has more calls than this many times the mean, and one more."""


class QueuedWorkPolicy:
    """As many replicas as it takes for each to have `rows_per_replica` U-Net rows still to compute.

    Jobs that wait for their turn count too.

    A picture of 50 guided steps weighs ten times one of 10 steps without guidance, which counting requests would not
    see.
    """

    def __init__(self, rows_per_replica: float = 1000.0) -> None:
        self.rows_per_replica = rows_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted now; Serve keeps it within bounds and waits for its delays."""
        told = context.aggregated_metrics or {}
        # Each replica knows its own work, and all know the same of the jobs before them.
        work = sum(told.get("queued_work", {}).values()) + max(told.get("queued_jobs", {}).values(), default=0.0)
        return max(1, math.ceil(work / self.rows_per_replica)), {}


class ConceptRouter(RequestRouter):
    """Calls with one concept go to one replica, which then holds it; where that one is busy, to the next in line.

    Each concept has its own order of the replicas, by hash: when a replica comes or goes, only its concepts move.
    Loads are bounded as in Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018: one
    concept that everybody asks for takes all replicas and not one.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred one first."""
        work = pending_request.args[0] if pending_request is not None and pending_request.args else None
        affinity = getattr(work, "affinity", "")
        if not affinity:
            return [candidate_replicas]
        calls = [self.replica_queue_len_cache.get(replica.replica_id) or 0 for replica in candidate_replicas]
        most = 1 + BUSIEST * (sum(calls) + 1) / len(calls)
        free = [replica for replica, held in zip(candidate_replicas, calls, strict=True) if held < most]
        return [[replica] for replica in sorted(free, key=partial(_weight, affinity))] + [candidate_replicas]


def _weight(affinity: str, replica: RunningReplica) -> bytes:
    return sha256(f"{affinity}|{replica.replica_id.unique_id}".encode()).digest()
