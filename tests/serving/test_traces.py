"""One request is one trace over the three deployments: spans, their parents, counts, and no text."""

from __future__ import annotations

import importlib.util
import secrets
from typing import Any

import httpx
import pytest

from aft_ray.config import TracesConfig
from aft_ray.errors import ConfigError
from aft_ray.serving.traces import check_traces
from tests.serving.otlp import Collector, Span

SECRET = "the moon is made of cheese"
ANSWER = "written by the aggregator"


def ask(url: str, trace: str, *, flags: str = "01", path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    """Ask as the client whose span is `aaaa...`."""
    asked = {"messages": [{"role": "user", "content": SECRET}]} if "chat" in path else {}
    headers = {"authorization": "Bearer key-one", "traceparent": f"00-{trace}-{'a' * 16}-{flags}"}
    return httpx.post(f"{url}{path}", json=asked | body, headers=headers, timeout=60)


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_request_is_one_trace_over_the_three_deployments(split_url: str, collector: Collector, stream: bool) -> None:
    trace = secrets.token_hex(16)
    reply = ask(split_url, trace, stream=stream)
    assert reply.status_code == 200
    spans = collector.trace(trace, lambda found: len(found) == 11)  # three, and layers with 2, 2 and 1 samples
    [request], [admission], [plan] = (named(spans, name) for name in ("request", "admission", "plan"))
    assert (request.parent, request.deployment) == ("a" * 16, "Ingress")
    assert (admission.parent, admission.deployment) == (request.id, "Ingress")
    assert (plan.parent, plan.deployment) == (request.id, "Aggregator")
    written = {}
    for number, (deployment, width) in enumerate([("Proposer", 2), ("Aggregator", 2), ("Aggregator", 1)]):
        [layer] = named(spans, f"layer {number}")
        assert (layer.parent, layer.deployment) == (plan.id, "Aggregator")
        samples = [span for span in named(spans, "sample") if span.parent == layer.id]
        assert [sample.deployment for sample in samples] == [deployment] * width
        assert {sample.attributes["aft.layer"] for sample in samples} == {number}
        assert all(layer.start <= sample.start <= sample.end for sample in samples)
        tokens = [sample.attributes["gen_ai.usage.output_tokens"] for sample in samples]
        assert sum(tokens) == layer.attributes["gen_ai.usage.output_tokens"] > 0
        assert all(sample.attributes["gen_ai.response.finish_reasons"] == ["stop"] for sample in samples)
        written[number] = samples
    assert [sample.events for sample in written[0]] == [(), ()]
    assert written[2][0].events == (("first token",) if stream else ())
    about = reply.headers["x-request-id"]
    assert {span.attributes["aft.request_id"] for span in spans if span.name != "admission"} == {about}
    assert request.attributes["gen_ai.request.model"] == "base"
    if not stream:
        assert request.attributes["gen_ai.usage.output_tokens"] == reply.json()["usage"]["completion_tokens"]
    assert not any(span.is_error for span in spans)
    assert request.end >= plan.end
    assert not any(text.encode() in body for body in collector.received for text in (SECRET, ANSWER, "first draft"))


def test_the_prompts_of_a_list_are_runs_of_one_trace(split_url: str, collector: Collector) -> None:
    trace = secrets.token_hex(16)
    body: Any = {"prompt": ["Hello", "Good day"], "aft": {"num_layers": 0}}
    assert ask(split_url, trace, path="/v1/completions", **body).status_code == 200
    spans = collector.trace(trace, lambda found: len(found) == 2 + 2 * 3)
    [request] = named(spans, "request")
    assert [span.parent for span in named(spans, "plan")] == [request.id] * 2
    assert len({span.attributes["aft.run_id"] for span in named(spans, "plan")}) == 2


def test_a_request_that_fails_is_marked_where_it_failed(split_url: str, collector: Collector) -> None:
    trace = secrets.token_hex(16)
    assert ask(split_url, trace, aft={"num_layers": 0}, max_tokens=2_000_000).status_code == 400  # before any span
    assert ask(split_url, trace, messages=[{"role": "user", "content": "word " * 30_000}]).status_code == 400
    spans = collector.trace(trace, lambda found: len(found) == 3)
    errors = {span.name: (span.is_error, span.attributes.get("error.type")) for span in spans}
    refused = (True, "context_length_exceeded")
    assert errors == {"request": refused, "admission": (False, None), "plan": refused}


def test_a_client_that_does_not_trace_is_not_traced(split_url: str, collector: Collector) -> None:
    untraced, traced = secrets.token_hex(16), secrets.token_hex(16)
    assert ask(split_url, untraced, flags="00").status_code == 200
    assert ask(split_url, traced).status_code == 200
    collector.trace(traced, lambda found: len(found) == 11)
    assert not any(span.trace == untraced for span in collector.spans)


def test_traces_without_their_packages_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_traces(None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        check_traces(TracesConfig(endpoint="http://127.0.0.1:4318"))
    check_traces(None)
