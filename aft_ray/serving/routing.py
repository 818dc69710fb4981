"""Which replica takes a call: the one with the fewest samples under way, because calls differ in what they cost.

Serve's own router compares numbers of calls, but one call may be one sample or sixteen. Every argument of a streamed
call is a `Routed`: it tells the router how many samples the call brings, and the router tells it which replica took
them, so that the caller can later ask that replica what a cancelled call cost.

Serve pickles this module by value, so `Routed`, which travels to other processes, is defined elsewhere.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from aft_ray.serving.replica_calls import Routed

STATS_PERIOD_S = 2.0
"""Interval between two reports of a replica's samples, through which a caller learns of the samples of others."""


class SampleRouter(RequestRouter):
    """Sends each call to the replica that is writing the fewest samples, as far as this process knows."""

    def initialize_state(self, **_: Any) -> None:
        self._own: Counter[ReplicaID] = Counter()
        """Samples that this process has asked of each replica and that have not ended."""
        self._others: dict[ReplicaID, int] = {}
        """Samples of other processes at each replica, by its last report."""
        self._reports: dict[ReplicaID, Any] = {}

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(list(replicas))
        for replica in replicas:
            key, report = replica.replica_id, replica.routing_stats
            if report and report != self._reports.get(key):
                self._reports[key] = report
                self._others[key] = max(0, report["num_samples"] - self._own[key])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which they should be asked."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, wait before the next round
        wanted = _routed(pending_request)
        named = [r for r in candidate_replicas if wanted is not None and r.replica_id.unique_id == wanted.replica]
        if named:
            return [named]
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))  # of equally loaded ones, any
        return [[replica] for replica in sorted(shuffled, key=lambda replica: self._load(replica.replica_id))]

    def _load(self, replica: ReplicaID) -> int:
        return self._own[replica] + self._others.get(replica, 0)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Note who took a call and count its samples until it ends. Serve calls this on the router's own event loop."""
        routed = _routed(pending_request)
        if routed is None:
            return
        routed.replica = replica_id.unique_id
        self._own[replica_id] += routed.num_samples
        loop = asyncio.get_running_loop()
        result.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._own.subtract, {replica_id: routed.num_samples})
        )


def _routed(request: PendingRequest | None) -> Routed[Any] | None:
    """Return the argument of a call, if it is one that is counted or addressed."""
    found = request.args[0] if request is not None and request.args else None
    return found if isinstance(found, Routed) else None


def by_samples() -> RequestRouterConfig:
    """Return the routing of a pool of engine replicas."""
    settings: dict[str, Any] = {
        "request_router_class": SampleRouter,
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }
    return RequestRouterConfig(**settings)
