"""How many replicas a pool of engines has: as many as its samples under way need.

Serve's own policy counts requests, of which one may be a single sample and the next one sixteen. This one counts what
fills an engine's batch. Serve pickles this module by value into its controller, so it imports nothing of this package.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

SAMPLES = "num_samples"
"""Name of the number that every replica reports (`EngineReplica.record_autoscaling_stats`)."""


class BySamples:
    """Scales a pool so that each replica writes `target_samples` samples on average.

    A request that waits for a replica is in no report yet, and counts as `samples_per_request`.
    """

    def __init__(self, target_samples: float, samples_per_request: float) -> None:
        self.target_samples = target_samples
        self.samples_per_request = samples_per_request

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas to have. Serve keeps it within its bounds and delays."""
        reports = (context.aggregated_metrics or {}).get(SAMPLES, {})
        waiting = (context.total_queued_requests or 0) * self.samples_per_request
        return math.ceil((sum(reports.values()) + waiting) / self.target_samples), dict(context.policy_state)
