"""deploy/observability: Prometheus finds Ray's exporters, Grafana finds the dashboards, which show what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from aft_ray.metrics import STAGES, TRAINING, Definition
from tests.command_line import ROOT
from tests.serving.test_metrics import as_grafana_reads_it, left_out, queries

FOLDER = ROOT / "deploy" / "observability"
DASHBOARDS = {"data": STAGES, "training": TRAINING}


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana" / "dashboards" / f"{name}.json").read_text())
    return found


def base_name(series: str, known: dict[str, Definition]) -> str:
    """Return the metric of a series of Prometheus: without `_bucket` where it is a histogram."""
    name = series.removesuffix("_bucket")
    return name if name in known and known[name].kind == "histogram" else series


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_asks_for_the_metrics_that_there_are(name: str) -> None:
    known = DASHBOARDS[name]
    asked = set(re.findall(r"ray_(aft_\w+)", " ".join(queries(dashboard(name)))))
    assert {base_name(series, known) for series in asked} == set(known)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_groups_by_labels_that_its_metrics_have(name: str) -> None:
    known = DASHBOARDS[name]
    for query in queries(dashboard(name)):
        names = {base_name(series, known) for series in re.findall(r"ray_(aft_\w+)", query)}
        labels = set.intersection(*(set(known[metric].labels) for metric in names)) | {"le"}
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        selected = set(re.findall(r"[{,](\w+)(?:=~|!=|=)\"", query))
        assert grouped | selected <= labels, query


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_takes_all_of_a_dashboard(name: str) -> None:
    own = dashboard(name)
    assert left_out(own, as_grafana_reads_it(own)) == []
    assert [panel["id"] for panel in own["panels"]] == list(range(1, len(own["panels"]) + 1))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in own["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in own["panels"])


def test_every_dashboard_has_a_name_of_its_own() -> None:
    serving = json.loads((ROOT / "serve_configs" / "grafana_dashboard.json").read_text())
    assert len({board["uid"] for board in (serving, *map(dashboard, DASHBOARDS))}) == 3


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus (Debian: prometheus)")
def test_prometheus_takes_the_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(FOLDER / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found["services"]  # type: ignore[no-any-return]


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Return the files and folders of this repository that a container sees, by their path in it."""
    pairs = [volume.split(":") for volume in service["volumes"]]
    return {pair[1]: (FOLDER / pair[0]).resolve() for pair in pairs if pair[0].startswith(".")}


def test_what_the_containers_mount_is_there_and_they_listen_on_loopback_only() -> None:
    services = compose()
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a version, not `latest`"
        assert all(path.exists() for path in mounts(service).values())
        assert "ports" not in service
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_grafana_finds_prometheus_and_every_dashboard() -> None:
    services = compose()
    seen = mounts(services["grafana"])
    provisioning = seen["/etc/grafana/provisioning"]
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "aft_ray.yaml").read_text())["providers"]
    below = [path for place, path in seen.items() if place.startswith(provider["options"]["path"] + "/")]
    found = [file.name for path in below for file in ([path] if path.is_file() else path.glob("*.json"))]
    assert sorted(found) == ["data.json", "grafana_dashboard.json", "training.json"]


def test_prometheus_reads_the_list_of_exporters_where_ray_writes_it() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    [job] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    [files] = [one["files"] for one in job["file_sd_configs"]]
    assert files == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert "/tmp/ray:/tmp/ray:ro" in compose()["prometheus"]["volumes"]
