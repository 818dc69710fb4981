"""OpenTelemetry traces: one request through ingress, aggregator and proposers. Off unless `serving.traces` is set.

    request                       Ingress       child of the client's `traceparent`, if it sent one
      admission                   Ingress
      plan                        Aggregator    one for each prompt of the request
        layer 0                   Aggregator
          sample, sample, ...     where they are written: Proposer, or Aggregator with topology `shared`
        layer 1
          sample                  event `first token`

What a span is a child of travels in the records that the deployments exchange anyway (`SpanParent`). Spans hold ids,
names, counts and times, and never text of a prompt or an answer. Without `serving.traces` no `Traces` is made, and
OpenTelemetry is not imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from aft_ray.config import TracesConfig
from aft_ray.engines.base import Engine, EngineEvent, EngineInfo, GenerateRequest, SpanParent, TokenDelta
from aft_ray.errors import AftError, ConfigError
from aft_ray.inference.events import Event, LayerUsage
from aft_ray.serving.errors import code_of

if TYPE_CHECKING:
    from aft_ray.serving.aggregator import Aggregator
    from aft_ray.serving.limits.ledger import OpenRequest
    from aft_ray.serving.openai.request import ChatCall
    from aft_ray.serving.run_request import RunRequest
    from aft_ray.serving.running_call import RunningCall

PACKAGES = {
    "opentelemetry.sdk.trace": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}
EXPORT_EVERY_MS = 1000
"""How long spans are collected before they are sent."""


def check_traces(config: TracesConfig | None) -> None:
    """Raise ConfigError where traces are asked for and a package for them is missing."""
    for module, package in PACKAGES.items() if config is not None else ():
        try:
            is_there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # its parent is missing
            is_there = False
        if not is_there:
            raise ConfigError(f"serving.traces needs the package {package}: pip install {package}, or leave it out")


def traces_of(config: TracesConfig | None, deployment: str) -> Traces | None:
    """Return what makes the spans of a replica; None where traces are off."""
    return None if config is None else Traces(config, deployment)


class Traces:
    """Makes the spans of one process and sends them from a thread of its own."""

    def __init__(self, config: TracesConfig, deployment: str) -> None:
        check_traces(config)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = {
            "service.name": config.service_name,
            "service.instance.id": f"{deployment}-{os.getpid()}",
            "aft.deployment": deployment,
        }
        provider = TracerProvider(
            resource=Resource.create(resource), sampler=ParentBasedTraceIdRatio(config.sample_ratio)
        )
        exporter = OTLPSpanExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
        self._tracer = provider.get_tracer("aft_ray")
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, name: str, parent: Mapping[str, str], attributes: Mapping[str, Any], *, is_entry: bool = False
    ) -> Any:
        """Return a new span. `parent`: W3C `traceparent` and `tracestate`; without them it is the first of a trace."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(
            name,
            context=self._propagator.extract(parent),
            kind=SpanKind.SERVER if is_entry else SpanKind.INTERNAL,
            attributes={key: value for key, value in attributes.items() if value is not None},
        )

    def parent_of(self, span: Any, attributes: Mapping[str, Any]) -> SpanParent | None:
        """Return what the children of a span are told. None where the span is not sampled, so there are none."""
        from opentelemetry.trace import set_span_in_context

        if not span.is_recording():
            return None
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return SpanParent(carrier=carrier, attributes=attributes)

    def request(self, calls: Sequence[ChatCall], request_id: str, headers: Mapping[str, str]) -> RequestTrace:
        return RequestTrace(self, calls, request_id, headers)

    async def run(
        self, request: RunRequest, parent: SpanParent, aggregator: Aggregator, on_usage: Callable[[LayerUsage], None]
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a run, with a span for its plan and for each of its layers."""
        trace = RunTrace(self, request, parent)

        def count(usage: LayerUsage) -> None:
            trace.layer_ended(usage)
            on_usage(usage)

        error: str | None = "cancelled"
        try:
            async with aclosing(trace.over(aggregator).run(request, count)) as events:
                async for event in events:
                    yield event
            error = None
        except AftError as failed:
            error = code_of(failed)
            raise
        finally:
            trace.ended(error)

    async def samples(
        self, request: GenerateRequest, info: EngineInfo, events: AsyncGenerator[EngineEvent, None]
    ) -> AsyncGenerator[EngineEvent, None]:
        """Yield the events of an engine request, with a span for each of its samples."""
        parent = request.trace
        assert parent is not None
        about = {
            **parent.attributes,
            "aft.engine_request": request.request_id,
            "gen_ai.request.model": info.model,
            "gen_ai.request.max_tokens": request.sampling.max_tokens,
            "aft.adapter": request.adapter,
        }
        spans = {
            index: self.begin("sample", parent.carrier, about | {"aft.sample": index})
            for index in range(len(request.seeds))
        }
        begun: set[int] = set()
        reason = "cancelled"
        try:
            async with aclosing(events):
                async for event in events:
                    if not isinstance(event, TokenDelta):
                        span = spans.pop(event.index)
                        span.set_attributes(
                            {
                                "gen_ai.usage.input_tokens": event.num_prompt_tokens,
                                "gen_ai.usage.output_tokens": event.num_tokens,
                                "aft.cached_tokens": event.num_cached_tokens,
                                "gen_ai.response.finish_reasons": [event.finish_reason],
                            }
                        )
                        end(span, "engine_error" if event.error is not None else None)
                    elif event.index not in begun:
                        begun.add(event.index)
                        spans[event.index].add_event("first token")
                    yield event
        except AftError as failed:
            reason = code_of(failed)
            raise
        finally:  # what is left was cut off
            written = request.written or Counter()
            for index, span in spans.items():
                span.set_attribute("gen_ai.usage.output_tokens", written[index])
                end(span, reason)


def end(span: Any, error: str | None = None) -> None:
    """End a span, with the code of what went wrong."""
    from opentelemetry.trace import StatusCode

    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR, error)
    span.end()


class RequestTrace:
    """The span of one request at the ingress, and that of its admission."""

    def __init__(self, traces: Traces, calls: Sequence[ChatCall], request_id: str, headers: Mapping[str, str]) -> None:
        self._traces = traces
        first = calls[0]
        about = {
            "aft.request_id": request_id,
            "gen_ai.request.model": first.model,
            "aft.num_proposals": first.plan.num_proposals,
            "aft.num_layers": first.plan.num_layers,
            "aft.num_prompts": len(calls),
            "aft.stream": first.stream,
        }
        self._span = traces.begin("request", headers, about, is_entry=True)
        self.parent = traces.parent_of(self._span, {"aft.request_id": request_id})
        self._admission = traces.begin("admission", self.parent.carrier, {}) if self.parent else None
        self._left: list[OpenRequest] = []

    def refused(self, code: str) -> None:
        """End the trace of a request that was not admitted."""
        for span in (self._admission, self._span):
            if span is not None:
                end(span, code)

    def admitted(self, runs: Sequence[RunningCall], opened: Sequence[OpenRequest]) -> None:
        """End the span of the admission now, and that of the request when its runs have ended."""
        if self._admission is not None:
            end(self._admission)
        self._left = list(opened)
        for run, one in zip(runs, opened, strict=True):
            run.when_ended(partial(self._run_ended, one, opened))

    def _run_ended(self, one: OpenRequest, opened: Sequence[OpenRequest]) -> None:
        self._left.remove(one)
        if self._left:
            return
        bills = [each.bill for each in opened]
        layers = [layer for bill in bills for layer in bill.layers]
        self._span.set_attribute("gen_ai.usage.input_tokens", sum(layer.prompt_tokens for layer in layers))
        self._span.set_attribute("gen_ai.usage.output_tokens", sum(layer.completion_tokens for layer in layers))
        errors = [bill.error or bill.status for bill in bills if bill.status != "answered"]
        end(self._span, errors[0] if errors else None)


class RunTrace:
    """The spans of one run at its aggregator: the plan, and each layer from its first engine request to its end."""

    def __init__(self, traces: Traces, request: RunRequest, parent: SpanParent) -> None:
        self._traces, self._run_id = traces, request.run_id
        self._about = {**parent.attributes, "aft.run_id": request.run_id}
        plan = {"aft.num_proposals": request.plan.num_proposals, "aft.num_layers": request.plan.num_layers}
        self._span = traces.begin("plan", parent.carrier, {**self._about, **plan, "aft.adapter": request.adapter})
        self._parent = traces.parent_of(self._span, self._about)
        self._layers: dict[int, Any] = {}

    def over(self, aggregator: Aggregator) -> Aggregator:
        """Return the aggregator with engines whose requests belong to this trace."""
        roles = [
            dataclasses.replace(role, engine=_TracedEngine(role.engine, self))
            for role in (aggregator.aggregator, *aggregator.proposers)
        ]
        return dataclasses.replace(aggregator, aggregator=roles[0], proposers=tuple(roles[1:]))

    def parent_for(self, request: GenerateRequest) -> SpanParent | None:
        """Return the span of an engine request's layer, which begins with its first request."""
        if self._parent is None:
            return None
        layer = int(request.request_id.removeprefix(f"{self._run_id}/").partition("/")[0])
        about = {**self._about, "aft.layer": layer}
        if layer not in self._layers:
            self._layers[layer] = self._traces.begin(f"layer {layer}", self._parent.carrier, about)
        return self._traces.parent_of(self._layers[layer], about)

    def layer_ended(self, usage: LayerUsage) -> None:
        """End the span of a layer (`on_usage` of a run). One that no engine was asked for has none."""
        span = self._layers.pop(usage.layer, None)
        if span is None:
            return
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "aft.cached_tokens": usage.cached_tokens,
                "aft.num_answers": usage.num_answers,
                "aft.num_failed": usage.num_failed,
                "aft.num_cancelled": usage.num_cancelled,
            }
        )
        end(span)

    def ended(self, error: str | None) -> None:
        for span in self._layers.values():
            end(span, error)
        end(self._span, error)


class _TracedEngine:
    """An engine whose requests are told which layer of a trace they belong to."""

    def __init__(self, engine: Engine, trace: RunTrace) -> None:
        self._engine, self._trace = engine, trace

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        return self._engine.generate(dataclasses.replace(request, trace=self._trace.parent_for(request)))

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        return await self._engine.score(prompt_ids, continuation_ids, adapter)

    async def check(self) -> None:
        await self._engine.check()

    async def close(self) -> None:
        await self._engine.close()
