"""The endpoint's Prometheus metrics. Ray exports each of them with the prefix `ray_`.

    curl -s http://NODE:PORT/metrics | grep ray_aft_      PORT: `ray start --metrics-export-port`, else `ray.nodes()`
    serve_configs/grafana_dashboard.json                  a dashboard over all of them

`METRICS.run(call)` times a run, `count_layer` counts the usage of a layer, `METRICS.rejected(reason)` counts
a request that was refused before its run. Labels are names of models, plans, layers and outcomes, so a client cannot
invent any. A histogram's `_sum` is Ray's estimate from the buckets: query quantiles, not means.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aft_ray.inference.events import AnswerDelta, Event, Finished, LayerUsage
from aft_ray.metrics import Definition, create
from aft_ray.serving.errors import code_of
from aft_ray.serving.openai.request import ChatCall, plan_name

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


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


FLUSH_S = 0.5
"""Longest time that a counter or a gauge is held back."""


@functools.cache
def metric(name: str) -> Any:
    """Return Ray's metric of that name. It is created at its first use, once per process."""
    return create(name, DEFINITIONS[name], SECONDS)


class Held:
    """Counters and gauges on their way to Ray, which takes longer to record one than to add up a hundred.

    A request changes ten of them. What changes within `FLUSH_S` becomes one call for each metric and its labels.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop on which they will be recorded, if they will."""

    def inc(self, name: str, number: float = 1, /, **labels: str) -> None:
        self._counts[name, frozenset(labels.items())] += number  # type: ignore[assignment]
        self._flush_later()

    def set(self, name: str, value: float, /, **labels: str) -> None:
        self._values[name, frozenset(labels.items())] = value
        self._flush_later()

    def _flush_later(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._loop = None
        counts, self._counts = self._counts, Counter()
        values, self._values = self._values, {}
        for (name, labels), number in counts.items():
            metric(name).inc(number, tags=dict(labels))
        for (name, labels), value in values.items():
            metric(name).set(value, tags=dict(labels))


HELD = Held()


class Metrics:
    """The metrics of one ingress process."""

    def __init__(self) -> None:
        self._in_flight = 0

    def rejected(self, reason: str) -> None:
        """Count a request that was refused before any engine request."""
        HELD.inc("aft_rejections_total", reason=reason)

    @contextmanager
    def run(self, call: ChatCall) -> Iterator[Callable[[Event], None]]:
        """Record time and outcome of the run in the block, which calls what this yields with each event."""
        labels = {"model": call.name, "plan": plan_name(call.plan)}
        started, is_first, outcome = time.monotonic(), True, "cancelled"

        def measure(event: Event) -> None:
            nonlocal is_first, outcome
            if isinstance(event, AnswerDelta) and is_first:
                is_first = False
                metric("aft_time_to_first_token_seconds").observe(time.monotonic() - started, tags=labels)
            elif isinstance(event, Finished):
                outcome = "ok"

        self._count_in_flight(1)
        try:
            yield measure
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            outcome = code_of(error)
            raise
        finally:
            self._count_in_flight(-1)
            tags = labels | {"outcome": outcome}
            HELD.inc("aft_requests_total", **tags)
            metric("aft_request_seconds").observe(time.monotonic() - started, tags=tags)

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        HELD.set("aft_requests_in_flight", self._in_flight)


METRICS = Metrics()


def count_layer(usage: LayerUsage) -> None:
    """Record the time, tokens and answers of a layer that is over, however it ended (a run's `on_usage`)."""
    layer = str(usage.layer)
    metric("aft_layer_seconds").observe(usage.seconds, tags={"layer": layer})
    tokens = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens, "cached": usage.cached_tokens}
    answers = {"ok": usage.num_answers, "failed": usage.num_failed, "cancelled": usage.num_cancelled}
    for kind, number in tokens.items():
        if number:
            HELD.inc("aft_tokens_total", number, kind=kind, layer=layer)
    for outcome, number in answers.items():
        if number:
            HELD.inc("aft_answers_total", number, outcome=outcome, layer=layer)


def engine_samples(pool: str, number: int) -> None:
    """Record how many samples this replica is writing now."""
    HELD.set("aft_engine_samples", number, pool=pool)
