"""A collector of OpenTelemetry traces: takes OTLP over HTTP and keeps every span."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, kw_only=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str
    deployment: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    is_error: bool
    start: int
    end: int


@dataclass
class Collector:
    url: str
    spans: list[Span] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        self.received.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            deployment = _attributes(resource.resource.attributes)["aft.deployment"]
            self.spans += [_span(span, deployment) for scope in resource.scope_spans for span in scope.spans]

    def trace(self, trace: str, is_whole: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait for the spans of a trace until they are whole, and return them in the order of their starts."""
        until = time.monotonic() + 20
        while True:
            found = sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)
            if is_whole(found):
                return found
            assert time.monotonic() < until, [span.name for span in found]
            time.sleep(0.05)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def _span(span: Any, deployment: str) -> Span:
    return Span(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        deployment=deployment,
        attributes=_attributes(span.attributes),
        events=tuple(event.name for event in span.events),
        is_error=span.status.code == 2,
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collect while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield collector
    server.shutdown()
