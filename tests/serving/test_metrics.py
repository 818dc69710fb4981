"""The metrics that Prometheus gets, read from Ray's export of a running application, and the dashboard over them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from aft_ray.serving.metrics import DEFINITIONS

DASHBOARD = Path(__file__).parents[2] / "serve_configs" / "grafana_dashboard.json"
USER: Any = [{"role": "user", "content": "Name three rivers."}]


def exported() -> str:
    """Return everything that this node's Ray agent exports to Prometheus."""
    import ray

    [node] = [node for node in ray.nodes() if node["Alive"]]
    return httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30).text


def value(page: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples with these labels."""
    lines = [line for line in page.splitlines() if line.startswith(f"ray_{name}{{")]
    wanted = [line for line in lines if all(f'{label}="{text}"' in line for label, text in labels.items())]
    return sum(float(line.rsplit(" ", 1)[1]) for line in wanted)


def eventually(condition: Callable[[str], bool], timeout_s: float = 90) -> str:
    """Wait until the condition holds, and return the export: workers report every few seconds."""
    end = time.monotonic() + timeout_s
    while not condition(page := exported()):
        assert time.monotonic() < end, "\n".join(line for line in page.splitlines() if line.startswith("ray_aft_"))
        time.sleep(0.5)
    return page


@pytest.fixture(scope="module")
def page(base_url: str) -> str:
    """The export after: two answers at K=1 L=2 (asked for here alone), one with a failed draft, a missed quorum, a
    refusal."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0) as client:
        for model in ("aft@k1-l2", "aft@k4-l1"):
            client.chat.completions.create(model=model, messages=USER)
        list(client.chat.completions.create(model="aft@k1-l2", messages=USER, stream=True))
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="aft@k4-l2", messages=USER, extra_body={"aft": {"quorum": 4}})
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4o", messages=USER)
    return eventually(
        lambda page: (
            value(page, "aft_requests_total", outcome="quorum_not_met", plan="k4-l2") >= 1
            and value(page, "aft_rejections_total", reason="model_not_found") >= 1
            and value(page, "aft_answers_total", outcome="failed", layer="0") >= 2
        )
    )


def test_requests_are_counted_and_timed_by_model_plan_and_outcome(page: str) -> None:
    labels = {"model": "aft", "plan": "k1-l2"}
    assert value(page, "aft_requests_total", outcome="ok", **labels) == 2
    assert value(page, "aft_request_seconds_count", outcome="ok", **labels) == 2
    # three layers of eight tokens, 10 ms each
    assert value(page, "aft_request_seconds_bucket", le="0.1", **labels) == 0
    # a reply in one piece has no first token
    assert value(page, "aft_time_to_first_token_seconds_bucket", le="+Inf", **labels) == 1
    assert value(page, "aft_time_to_first_token_seconds_bucket", le="0.05", **labels) == 0


def test_tokens_and_answers_are_counted_by_layer(page: str) -> None:
    assert value(page, "aft_tokens_total", kind="completion", layer="0") >= 2 * 8
    assert value(page, "aft_tokens_total", kind="prompt", layer="1") > 0
    assert value(page, "aft_answers_total", outcome="ok", layer="1") >= 3
    assert value(page, "aft_answers_total", outcome="failed", layer="0") >= 2
    assert value(page, "aft_layer_seconds_count", layer="0") >= 4


def test_every_metric_appears_under_its_documented_name(page: str) -> None:
    suffixes = {"histogram": "_bucket"}
    names = [f"ray_{name}{suffixes.get(metric.kind, '')}{{" for name, metric in DEFINITIONS.items()]
    eventually(lambda page: all(name in page for name in names))


def test_nothing_is_in_flight_once_the_answers_are_out(page: str) -> None:
    eventually(lambda page: value(page, "aft_requests_in_flight") == value(page, "aft_engine_samples") == 0)


def test_a_metrics_labels_are_known_names_and_never_a_clients_words(page: str) -> None:
    ours = [line for line in page.splitlines() if line.startswith("ray_aft_")]
    assert not any("gpt-4o" in line or "rivers" in line for line in ours)
    # other applications of this cluster serve other names: only what the ingress asked above says counts here
    [ingress] = {worker_of(line) for line in ours if 'model="aft"' in line and 'plan="k1-l2"' in line}
    its_own = [line for line in ours if worker_of(line) == ingress]
    assert set(re.findall(r'model="([^"]*)"', "\n".join(its_own))) <= {"base", "sft", "aft"}


def worker_of(line: str) -> str:
    """Return the process that reported a sample."""
    [worker] = re.findall(r'WorkerId="([^"]+)"', line)
    return str(worker)


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*panels, *(v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query")]


def test_the_dashboard_asks_for_metrics_that_exist_and_leaves_none_out() -> None:
    asked = set(re.findall(r"ray_(aft_\w+)", " ".join(queries(json.loads(DASHBOARD.read_text())))))
    histograms = {name for name, definition in DEFINITIONS.items() if definition.kind == "histogram"}
    known = set(DEFINITIONS) | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert asked <= known - histograms
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == set(DEFINITIONS)


def test_the_dashboard_groups_by_labels_that_its_metrics_have() -> None:
    for query in queries(json.loads(DASHBOARD.read_text())):
        names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"ray_(aft_\w+)", query)}
        labels = {label for name in names for label in DEFINITIONS[name].labels} | {"le"}
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        selected = set(re.findall(r"[{,](\w+)(?:=~|!=|=)\"", query))
        assert grouped | selected <= labels, query


def left_out(written: Any, read: Any, path: str = "") -> list[str]:
    """Return the places where `read` lacks something that `written` has, or differs from it."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [place for key in written for place in left_out(written[key], read.get(key), f"{path}/{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = enumerate(zip(written, read, strict=True))
        return [place for number, (own, other) in pairs for place in left_out(own, other, f"{path}/{number}")]
    return [] if written == read else [path]


def as_grafana_reads_it(dashboard: dict[str, Any]) -> Any:
    """Load and save a dashboard with Grafana's own model, which drops keys that it does not know."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def test_grafanas_own_model_knows_all_that_the_dashboard_says() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert left_out(dashboard, as_grafana_reads_it(dashboard)) == []
    dashboard["panels"][3]["targets"][0]["expression"] = "up"
    assert left_out(dashboard, as_grafana_reads_it(dashboard)) == ["/panels/3/targets/0/expression"]


def test_the_dashboard_has_what_grafana_needs_to_load_it() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= set(dashboard)
    assert [panel["id"] for panel in dashboard["panels"]] == list(range(1, len(dashboard["panels"]) + 1))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    for panel in dashboard["panels"]:
        assert {"type", "title", "gridPos", "datasource", "fieldConfig", "targets"} <= set(panel)
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all({"expr", "refId", "legendFormat"} <= set(target) for target in panel["targets"])
