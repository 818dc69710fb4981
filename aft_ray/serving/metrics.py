"""The endpoint's Prometheus metrics. Ray exports each of them with the prefix `ray_`.

    curl -s http://NODE:PORT/metrics | grep ray_aft_      PORT: `ray start --metrics-export-port`, else `ray.nodes()`
    serve_configs/grafana_dashboard.json                  a dashboard over all of them

`METRICS.timed(events, call)` times a run, `count_layer` counts the usage of a layer, `METRICS.rejected(reason)` counts
a request that was refused before its run. Labels are names of models, plans, layers and outcomes, so a client cannot
invent any. A histogram's `_sum` is Ray's estimate from the buckets: query quantiles, not means.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.inference.events import AnswerDelta, Event, Finished, LayerUsage
from aft_ray.serving.http_errors import code_of
from aft_ray.serving.openai_request import ChatCall, plan_name

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass(frozen=True)
class Definition:
    """A metric. Names of counters end in `_total`; times are in seconds."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()


DEFINITIONS: dict[str, Definition] = {
    "aft_request_seconds": Definition("histogram", "Time from a run's start to its end", ("model", "plan", "outcome")),
    "aft_time_to_first_token_seconds": Definition(
        "histogram", "Time from a run's start to the first token of its final layer", ("model", "plan")
    ),
    "aft_layer_seconds": Definition("histogram", "Time of one layer", ("layer",)),
    "aft_requests_total": Definition(
        "counter", "Runs that ended: ok, cancelled (the client left), or an error code", ("model", "plan", "outcome")
    ),
    "aft_rejections_total": Definition("counter", "Requests turned away before a run, by error code", ("reason",)),
    "aft_tokens_total": Definition(
        "counter", "Tokens: prompt, completion, and of the prompt ones `cached`, saved by the prefix cache",
        ("kind", "layer"),
    ),
    "aft_answers_total": Definition("counter", "Answers of a layer: ok, failed, cancelled", ("outcome", "layer")),
    "aft_requests_in_flight": Definition("gauge", "Runs under way in one ingress replica"),
    "aft_engine_samples": Definition("gauge", "Samples that one engine replica is writing or has queued", ("pool",)),
}  # fmt: skip


@functools.cache
def metric(name: str) -> Any:
    """Return Ray's metric of that name. It is created at its first use, once per process."""
    from ray.util.metrics import Counter, Gauge, Histogram

    definition = DEFINITIONS[name]
    if definition.kind == "histogram":
        return Histogram(name, definition.description, boundaries=list(SECONDS), tag_keys=definition.labels)
    kind = Counter if definition.kind == "counter" else Gauge
    return kind(name, definition.description, tag_keys=definition.labels)


class Metrics:
    """The metrics of one ingress process."""

    def __init__(self) -> None:
        self._in_flight = 0

    def rejected(self, reason: str) -> None:
        """Count a request that was refused before any engine request."""
        metric("aft_rejections_total").inc(tags={"reason": reason})

    async def timed(self, events: AsyncGenerator[Event, None], call: ChatCall) -> AsyncGenerator[Event, None]:
        """Yield the events of a run unchanged, and record its time and its outcome."""
        labels = {"model": call.name, "plan": plan_name(call.plan)}
        started, is_first, outcome = time.monotonic(), True, "cancelled"
        self._count_in_flight(1)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, AnswerDelta) and is_first:
                        is_first = False
                        metric("aft_time_to_first_token_seconds").observe(time.monotonic() - started, tags=labels)
                    elif isinstance(event, Finished):
                        outcome = "ok"
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            outcome = code_of(error)
            raise
        finally:
            self._count_in_flight(-1)
            tags = labels | {"outcome": outcome}
            metric("aft_requests_total").inc(tags=tags)
            metric("aft_request_seconds").observe(time.monotonic() - started, tags=tags)

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        metric("aft_requests_in_flight").set(self._in_flight)


METRICS = Metrics()


def count_layer(usage: LayerUsage) -> None:
    """Record the time, tokens and answers of a layer that is over, however it ended (a run's `on_usage`)."""
    layer = str(usage.layer)
    metric("aft_layer_seconds").observe(usage.seconds, tags={"layer": layer})
    tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "cached": usage.cached_tokens}
    answers = {"ok": usage.num_answers, "failed": usage.num_failed, "cancelled": usage.num_cancelled}
    for kind, number in tokens.items():
        if number:
            metric("aft_tokens_total").inc(number, tags={"kind": kind, "layer": layer})
    for outcome, number in answers.items():
        if number:
            metric("aft_answers_total").inc(number, tags={"outcome": outcome, "layer": layer})


def engine_samples(pool: str, number: int) -> None:
    """Record how many samples this replica is writing now."""
    metric("aft_engine_samples").set(number, tags={"pool": pool})
