"""deploy/kuberay/: every manifest against the schema of its kind, by Ray's own code, and what must never be in one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from aft_ray.cluster_fit import num_held, resources_of_worker
from aft_ray.config import ServingConfig, load_config
from aft_ray.config.loading import validate
from aft_ray.serving.openai.request import LONGEST_REQUEST_S
from tests.deploy.test_image import TEXT as DOCKERFILE
from tests.deploy.test_image import lock

ROOT = Path(__file__).parent.parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
SCHEMAS = sorted((Path(__file__).parent / "schemas").glob("*.json"))
APPLIED = [
    "common",
    "monitoring",
    "cluster",
    "line",
    "stage",
    "service",
    "kueue",
    "kind/cluster",
    "kind/line",
    "kind/service",
]
JOBS = [name for name in APPLIED if name.endswith(("line", "stage"))]
SERVICES = [name for name in APPLIED if name.endswith("service")]


@cache
def rendered(name: str) -> list[dict[str, Any]]:
    """Return the manifests that `kubectl apply -k` sends."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl renders the manifests")
    command = ["kubectl", "kustomize", str(KUBERAY / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def validators() -> dict[str, Draft202012Validator]:
    found = {}
    for file in SCHEMAS:
        schemas = json.loads(file.read_text())
        for kind, schema in schemas.get("kinds", {}).items():
            found[kind] = Draft202012Validator({**schema, "$defs": schemas["$defs"]})
    return found


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return what the schema of its kind says against a manifest."""
    kind = f"{manifest['apiVersion']} {manifest['kind']}"
    if kind in validators():
        errors = validators()[kind].iter_errors({**manifest, "metadata": {}})
        return [f"{error.json_path}: {error.message}" for error in errors]
    kubernetes = pytest.importorskip("kubernetes_validate", reason="make deploy-tools installs kubernetes-validate")
    try:
        kubernetes.validate(manifest, kubernetes.latest_version(), strict=True)
    except kubernetes.ValidationError as error:
        return [str(error)]
    return []


def clusters(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield every manifest with a cluster, and the cluster's spec."""
    places = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
    for manifest in rendered(name):
        if manifest["kind"] in places:
            spec = manifest["spec"]
            for key in places[manifest["kind"]]:
                spec = spec[key]
            yield manifest, spec


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template, with the name of its group."""
    for _, cluster in clusters(name):
        yield "head", cluster["headGroupSpec"]["template"]["spec"]
        yield from ((group["groupName"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"])
    for manifest in rendered(name):
        if manifest["kind"] in {"StatefulSet", "Deployment"}:
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def test_every_folder_with_something_to_apply_is_tested() -> None:
    found = {
        str(file.parent.relative_to(KUBERAY))
        for file in KUBERAY.rglob("kustomization.yaml")
        if "kind: Kustomization" in file.read_text()
    }
    assert found == set(APPLIED)


@pytest.mark.parametrize("name", APPLIED)
def test_every_manifest_fits_the_schema_of_its_kind(name: str) -> None:
    manifests = rendered(name)
    assert manifests
    for manifest in manifests:
        assert problems(manifest) == [], manifest["kind"]


@pytest.mark.parametrize(
    "name, path, value",
    [
        ("cluster", ("spec", "autoscalerOptions", "version"), "v3"),
        ("cluster", ("spec", "headGroupSpec", "template", "spec", "containers", 0, "images"), "x"),
        ("line", ("spec", "entryPoint"), "python"),
        ("line", ("spec", "rayClusterSpec", "authOptions", "mode"), "off"),
        ("service", ("spec", "upgradeStrategy", "kind"), "NewCluster"),
        ("kueue", ("spec", "resourceGroup"), []),
        ("common", ("automountServiceAccountTokens",), False),
    ],
)
def test_the_schemas_find_a_wrong_field(name: str, path: tuple[Any, ...], value: Any) -> None:
    first = next((manifest for manifest, _ in clusters(name)), rendered(name)[0])
    manifest = json.loads(json.dumps(first))
    assert problems(manifest) == []
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert problems(manifest)


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: file.stem)
def test_schemas_name_their_source_version_and_licence(file: Path) -> None:
    schemas = json.loads(file.read_text())
    readme = (file.parent / "README.md").read_text()
    assert schemas["license"] == "Apache-2.0"
    assert f"| `{file.name}` | {schemas['source'].removeprefix('https://github.com/')}," in readme
    assert f"| {schemas['version']} |" in readme


# ── what Ray makes of them ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["cluster", "line", "service", "kind/cluster"])
def test_rays_autoscaler_sees_groups_that_hold_the_workers_of_the_configs(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    ((_, spec),) = clusters(name)
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "x"}, "spec": spec})
    types = config["available_node_types"]
    head = types[config["head_node_type"]]["resources"]
    assert (head["CPU"], head["aft_autoscaling"]) == (0, 1), "no work on the head, and aft_ray knows that pods can come"
    del types[config["head_node_type"]]
    assert all(kind["min_workers"] == 0 and 0 < kind["max_workers"] <= 4 for kind in types.values())

    def holding(num_gpus: float, accelerator: str | None) -> list[str]:
        wanted = resources_of_worker(1, num_gpus, accelerator)
        return [group for group, kind in types.items() if num_held(kind["resources"], wanted)]

    assert holding(1, "L40S") == ["gpu-1"]
    assert holding(0, None)[0] == "cpu"
    assert holding(8, "H100") == ([] if name == "service" else ["gpu-8"])


@pytest.mark.parametrize("name", APPLIED)
def test_ray_is_the_version_of_the_lock_and_every_port_of_it_wants_the_token(name: str) -> None:
    for _, spec in clusters(name):
        assert spec["rayVersion"] == lock("gpu")["ray"] == lock("cpu")["ray"]
        assert spec["authOptions"] == {"mode": "token"}
        if spec.get("enableInTreeAutoscaling"):
            assert spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", SERVICES)
def test_the_endpoint_is_accepted_by_serve_and_by_us_and_wants_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    from aft_ray.errors import ConfigError
    from aft_ray.serving import build_app

    ((manifest, spec),) = clusters(name)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (app,) = schema.applications
    config = validate(ServingConfig, app.args, origin=name)
    assert app.import_path == "aft_ray.serving:build_app"
    assert (schema.http_options.host, schema.http_options.port) == (config.host, config.port) == ("0.0.0.0", 8000)
    monkeypatch.delenv("AFT_RAY_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="AFT_RAY_API_KEYS is not set"):
        build_app(app.args)
    monkeypatch.setenv("AFT_RAY_API_KEYS", "tests")
    build_app(app.args)
    if config.aggregator.accelerator_type:
        offered = [group.get("resources", {}) for group in spec["workerGroupSpecs"]]
        assert {f"accelerator_type:{config.aggregator.accelerator_type}": "1"} in offered


@pytest.mark.parametrize("name", SERVICES)
def test_no_request_is_cut_by_an_update_or_by_a_pod_that_goes(name: str) -> None:
    ((manifest, cluster),) = clusters(name)
    spec = manifest["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] > LONGEST_REQUEST_S
    assert spec["excludeHeadPodFromServeSvc"] is True
    routes = (ROOT / "aft_ray" / "serving" / "http" / "api.py").read_text()
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        probe = pod["containers"][0]["readinessProbe"]["httpGet"]
        assert probe["port"] in {port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert f'@router.get("{probe["path"]}"' in routes
        command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert pod["terminationGracePeriodSeconds"] >= int(seconds) + LONGEST_REQUEST_S


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_what_is_in_the_image_and_go_on_after_a_loss(name: str) -> None:
    ((manifest, _),) = clusters(name)
    spec = manifest["spec"]
    assert spec["submissionMode"] == "HTTPMode", "no stream of logs decides when a job is over"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0
    python, script, *rest = shlex.split(spec["entrypoint"])
    assert python == "python"
    if script == "-c":
        compile(rest[0], name, "exec")
        return
    assert spec["backoffLimit"] > 0
    place = "WORKDIR /opt/aft_ray"
    assert place in DOCKERFILE and "COPY jobs jobs" in DOCKERFILE and "COPY configs configs" in DOCKERFILE
    in_image = "/opt/aft_ray/"
    assert (ROOT / script.removeprefix(in_image)).is_file()
    options = list(zip(rest[::2], rest[1::2], strict=True))
    (config,) = (value for flag, value in options if flag == "--config")
    overrides = [value for flag, value in options if flag == "--set"]
    assert load_config(ROOT / config.removeprefix(in_image), overrides).run.dir.startswith("s3://")


def test_a_queued_job_asks_for_all_its_pods_at_once_and_fits_the_quota() -> None:
    ((job, cluster),) = clusters("stage")
    queue = {manifest["kind"]: manifest for manifest in rendered("kueue")}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["LocalQueue"]["metadata"]["name"]
    assert queue["LocalQueue"]["spec"]["clusterQueue"] == queue["ClusterQueue"]["metadata"]["name"]
    assert "enableInTreeAutoscaling" not in cluster, (
        "Kueue refuses a job whose cluster grows, unless it is an elastic one"
    )
    (flavor,) = queue["ClusterQueue"]["spec"]["resourceGroups"][0]["flavors"]
    quota = {one["name"]: amount(one["nominalQuota"]) for one in flavor["resources"]}
    asked = dict.fromkeys(quota, 0.0)
    for _, pod in pods("stage"):
        for resource, value in pod["containers"][0]["resources"]["requests"].items():
            asked[resource] += amount(value)
    assert all(0 < asked[resource] <= quota[resource] for resource in quota)


def amount(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


# ── what must never be in one ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", APPLIED)
def test_secrets_are_named_and_never_given(name: str) -> None:
    for manifest in rendered(name):
        assert manifest["kind"] != "Secret"
    for group, pod in pods(name):
        for container in pod["containers"]:
            for variable in container.get("env", []):
                is_secret = re.search(r"TOKEN|KEY|SECRET|PASSWORD", variable["name"])
                assert not is_secret or "secretKeyRef" in variable["valueFrom"], group
            for source in container.get("envFrom", []):
                assert set(source) == {"secretRef"}


@pytest.mark.parametrize("name", APPLIED)
def test_pods_have_few_rights(name: str) -> None:
    for group, pod in pods(name):
        of_pod = pod["securityContext"]
        assert of_pod["runAsNonRoot"] is True
        assert of_pod["runAsUser"] == (999 if group == "aft-ray-redis" else 10001)
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "hostPort" not in json.dumps(container)
        if group != "head" or name == "stage":
            assert pod["automountServiceAccountToken"] is False


def test_the_network_policy_closes_all_but_the_endpoint_to_strangers() -> None:
    (policy,) = (manifest for manifest in rendered("common") if manifest["kind"] == "NetworkPolicy")
    spec = policy["spec"]
    ray = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["podSelector"] == ray
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    opened = {}
    for rule in spec["ingress"]:
        (source,) = rule["from"]
        ports = frozenset(port["port"] for port in rule.get("ports", []))
        if source == {"podSelector": ray}:
            continue
        assert ports, "only Ray's own pods reach every port"
        labels = source.get("podSelector", source.get("namespaceSelector"))["matchLabels"]
        opened[next(iter(labels.values()))] = ports
    assert opened == {
        "kuberay-operator": {8265, 52365, 8000},
        "monitoring": {8080, 44217, 44227},
        "true": {8000},
    }


def test_prometheus_finds_the_ports_that_pods_have() -> None:
    (monitor,) = (manifest for manifest in rendered("monitoring") if manifest["kind"] == "PodMonitor")
    watched = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for name in ("cluster", "line", "stage", "service"):
        for group, pod in pods(name):
            if group == "aft-ray-redis":
                continue
            named = {port["name"] for port in pod["containers"][0]["ports"]}
            assert "metrics" in named & watched, group
            assert group != "head" or name == "stage" or watched <= named


@pytest.mark.parametrize("name", ["line", "service", "kind/line", "kind/service"])
def test_what_is_made_from_the_cluster_has_its_groups_and_leaves_no_second_cluster(name: str) -> None:
    ((_, base),) = clusters(name.replace("line", "cluster").replace("service", "cluster"))
    ((manifest, spec),) = clusters(name)
    assert [one["kind"] for one in rendered(name)].count("RayCluster") == 0
    groups = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert groups == [group["groupName"] for group in base["workerGroupSpecs"]][: len(groups)]
    if manifest["kind"] == "RayJob":
        assert spec == base


def test_images_have_the_tags_that_the_dockerfile_says() -> None:
    tags = set(re.findall(r"aft-ray:([\d.]+-[cg]pu)", DOCKERFILE))
    for name in APPLIED:
        for group, pod in pods(name):
            image = pod["containers"][0]["image"]
            if group != "aft-ray-redis":
                assert image.rpartition("/")[2].partition(":")[2] in tags
                assert image.endswith("-cpu") == name.startswith("kind/")


@pytest.mark.parametrize("name", ["kind/cluster", "kind/line", "kind/service"])
def test_pods_in_kind_want_no_device_and_fit_two_cores(name: str) -> None:
    ((_, spec),) = clusters(name)
    for group, pod in pods(name):
        resources = pod["containers"][0]["resources"]
        assert "nvidia.com/gpu" not in json.dumps(resources), group
        assert "nodeSelector" not in pod
        assert amount(resources["requests"]["cpu"]) <= 0.2
    pretended = [group["resources"].get("GPU") for group in spec["workerGroupSpecs"]]
    assert "1" in pretended
