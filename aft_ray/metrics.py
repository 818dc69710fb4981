"""The Prometheus metrics of data stages and of training. Ray exports each of them with the prefix `ray_`.

    curl -s http://NODE:PORT/metrics | grep ray_aft_      PORT: `ray start --metrics-export-port`, else `ray.nodes()`
    deploy/observability/                                 Prometheus and Grafana, with a dashboard per room

Workers count what they make themselves, so what is counted survives the driver, and nothing is counted twice when a
stage resumes. The endpoint's metrics are in serving/metrics.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

LONG_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)


@dataclass(frozen=True)
class Definition:
    """A metric. Names of counters end in `_total`; times are in seconds."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


STAGES: dict[str, Definition] = {
    "aft_rows_total": Definition("counter", "Rows that a stage made: ok or failed", ("run", "stage", "outcome")),
    "aft_stage_tokens_total": Definition("counter", "Tokens that were generated for a stage's rows", ("run", "stage")),
    "aft_shards_total": Definition("counter", "Shards that were written", ("run", "stage")),
    "aft_shard_seconds": Definition("histogram", "Time from a shard's first row to its file", ("run", "stage")),
    "aft_workers_started_total": Definition("counter", "Workers that were built, also after a death", ("run", "stage")),
    "aft_worker_start_seconds": Definition("histogram", "Time to build a worker: to load its model", ("run", "stage")),
    "aft_engine_deaths_total": Definition("counter", "Engines that died under a stage", ("run", "stage")),
}
TRAINING: dict[str, Definition] = {
    "aft_train_starts_total": Definition("counter", "Starts of a training, also from a checkpoint", ("run", "variant")),
    "aft_train_steps_total": Definition("counter", "Optimizer steps", ("run", "variant")),
    "aft_train_step_seconds": Definition("histogram", "Time of an optimizer step", ("run", "variant")),
    "aft_train_tokens_total": Definition(
        "counter", "Tokens of the batches without padding: all, and those in the loss", ("run", "variant", "kind")
    ),
    "aft_train_loss": Definition("gauge", "Loss of the last step", ("run", "variant")),
    "aft_train_gradient_norm": Definition("gauge", "Norm of the last step's gradient", ("run", "variant")),
}


@functools.cache
def metric(name: str) -> Any:
    """Return the metric of a stage or of training. It is created at its first use, once per process."""
    return create(name, (STAGES | TRAINING)[name], LONG_SECONDS)


def create(name: str, definition: Definition, boundaries: tuple[float, ...]) -> Any:
    """Return a new metric of Ray's."""
    from ray.util.metrics import Counter, Gauge, Histogram

    if definition.kind == "histogram":
        return Histogram(name, definition.description, boundaries=list(boundaries), tag_keys=definition.labels)
    kind = Counter if definition.kind == "counter" else Gauge
    return kind(name, definition.description, tag_keys=definition.labels)


def count_shard(run: str, stage: str, *, num_ok: int, num_failed: int, num_tokens: int, seconds: float) -> None:
    """Record a shard that was written."""
    labels = {"run": run, "stage": stage}
    metric("aft_shards_total").inc(tags=labels)
    metric("aft_shard_seconds").observe(seconds, tags=labels)
    for outcome, number in {"ok": num_ok, "failed": num_failed}.items():
        if number:
            metric("aft_rows_total").inc(number, tags=labels | {"outcome": outcome})
    if num_tokens:
        metric("aft_stage_tokens_total").inc(num_tokens, tags=labels)


def count_worker(run: str, stage: str, *, seconds: float) -> None:
    """Record a worker that was built."""
    labels = {"run": run, "stage": stage}
    metric("aft_workers_started_total").inc(tags=labels)
    metric("aft_worker_start_seconds").observe(seconds, tags=labels)


def count_engine_death(run: str, stage: str) -> None:
    """Record an engine that died."""
    metric("aft_engine_deaths_total").inc(tags={"run": run, "stage": stage})


def count_training_start(run: str, variant: str) -> None:
    """Record that a training begins, or goes on from a checkpoint."""
    metric("aft_train_starts_total").inc(tags={"run": run, "variant": variant})


def count_step(run: str, variant: str, row: dict[str, Any]) -> None:
    """Record an optimizer step, from its line of metrics.jsonl."""
    labels = {"run": run, "variant": variant}
    metric("aft_train_steps_total").inc(tags=labels)
    metric("aft_train_step_seconds").observe(row["seconds"], tags=labels)
    metric("aft_train_loss").set(row["loss"], tags=labels)
    if row.get("grad_norm") is not None:
        metric("aft_train_gradient_norm").set(row["grad_norm"], tags=labels)
    for kind, number in {"all": row["tokens"], "in_loss": row["trained_tokens"]}.items():
        if number:
            metric("aft_train_tokens_total").inc(number, tags=labels | {"kind": kind})
