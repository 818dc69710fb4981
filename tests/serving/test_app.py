"""What is refused before anything starts, and the Serve YAMLs of the repository."""

from __future__ import annotations

import ast
import pickle
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from aft_ray.config import (
    ReplicaConfig,
    ScriptedEngineConfig,
    ServingConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
    validate,
)
from aft_ray.engines import Sampling
from aft_ray.errors import ConfigError, EngineError, QuorumNotMet
from aft_ray.inference.plan import Plan
from aft_ray.serving import scaling
from aft_ray.serving.app import serve_app
from aft_ray.serving.deployments import application, build_app, pool_options
from aft_ray.serving.limits.keys import KeyRing, digest, is_loopback
from aft_ray.serving.openai.request import LONGEST_REQUEST_S
from aft_ray.serving.replica import check_adapters
from aft_ray.serving.replica_calls import as_aft_error
from aft_ray.serving.scaling import BySamples

YAMLS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))
ENGINE = {"type": "scripted"}


def test_four_deployment_shapes_come_with_the_project() -> None:
    assert [path.stem for path in YAMLS] == ["quickstart", "shared_8gpu", "single_gpu", "split_multinode"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_serve_yaml_is_accepted_by_serve_and_by_us_and_stays_on_loopback(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [app] = schema.applications
    assert app.import_path == "aft_ray.serving:build_app"
    config = validate(ServingConfig, app.args, origin=path.name)
    assert (schema.http_options.host, config.host) == ("127.0.0.1", "127.0.0.1")
    assert schema.http_options.port == config.port
    build_app(app.args)


def deployments(args: dict[str, Any]) -> list[str]:
    from ray.serve._private.build_app import build_app as built

    def no_handle(*_: Any) -> Any:
        return None

    app = built(build_app(args), name="test", make_deployment_handle=no_handle)
    return sorted(deployment.name for deployment in app.deployments)


def test_a_shared_topology_has_one_pool_and_a_split_one_two() -> None:
    assert deployments({"engine": ENGINE}) == ["Aggregator", "Ingress"]
    assert deployments({"engine": ENGINE, "topology": "split"}) == ["Aggregator", "Ingress", "Proposer"]


@dataclass(frozen=True)
class Edge:
    """What a deployment gets in place of a handle."""

    to: str


def graph(args: dict[str, Any]) -> dict[str, set[str]]:
    """Return, for each deployment, those that it holds handles to."""
    from ray.serve._private.build_app import build_app as built

    app = built(build_app(args), name="test", make_deployment_handle=lambda deployment, _: Edge(deployment.name))
    return {
        deployment.name: {argument.to for argument in deployment.init_args if isinstance(argument, Edge)}
        for deployment in app.deployments
    }


def test_proposers_feed_aggregators_and_the_ingress_knows_only_these() -> None:
    assert graph({"engine": ENGINE}) == {"Ingress": {"Aggregator"}, "Aggregator": set()}
    proposers = [{"name": name, "engine": ENGINE} for name in ("small", "large")]
    assert graph({"engine": ENGINE, "topology": "split", "proposers": proposers}) == {
        "Ingress": {"Aggregator"},
        "Aggregator": {"Proposer-small", "Proposer-large"},
        "Proposer-small": set(),
        "Proposer-large": set(),
    }


def test_several_models_that_draft_have_a_pool_each() -> None:
    proposers = [{"name": name, "engine": ENGINE, "share": 2} for name in ("small", "large")]
    names = deployments({"engine": ENGINE, "topology": "split", "proposers": proposers})
    assert names == ["Aggregator", "Ingress", "Proposer-large", "Proposer-small"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "serving.engine: missing"),
        ({"engine": ENGINE, "toplogy": "split"}, "did you mean 'topology'"),
        ({"engine": ENGINE, "host": "0.0.0.0"}, "no API keys"),
        ({"engine": ENGINE, "host": "example.org"}, "no API keys"),
        ({"engine": ENGINE, "api_keys_env": "AFT_RAY_TEST_UNSET"}, "AFT_RAY_TEST_UNSET is not set"),
        ({"engine": ENGINE, "default_model": "aft"}, "not one of the models"),
        ({"engine": ENGINE, "adapters": {"base": "/x"}}, "also the name of an adapter"),
        ({"engine": ENGINE, "topology": "split", "proposer_adapter": "sft"}, "not one of the adapters"),
        ({"engine": ENGINE, "proposer_engine": ENGINE}, "set split"),
        ({"engine": ENGINE, "proposers": [{"name": "a", "engine": ENGINE}]}, "set split"),
        (
            {"engine": ENGINE, "topology": "split", "proposers": [{"name": "a", "engine": ENGINE}] * 2},
            "two of them have the same name: a, a",
        ),
        ({"engine": ENGINE, "keys_file": "/nowhere.yaml"}, "/nowhere.yaml: no such file"),
        ({"engine": ENGINE, "max_tokens": 100}, "max_tokens 512: this server allows at most 100"),
        ({"engine": ENGINE, "max_num_proposals": 2}, "aft.num_proposals 5"),
    ],
)
def test_a_configuration_that_cannot_serve_is_refused_with_a_sentence(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_app(args)


def test_an_open_server_is_refused_before_ray_is_touched() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines"):
        serve_app(ServingConfig(engine=ScriptedEngineConfig(), host="0.0.0.0"))


def test_keys_open_the_server_and_only_their_digests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFT_RAY_TEST_SOME_KEYS", "key-one,key-two")
    app = application(
        ServingConfig(engine=ScriptedEngineConfig(), host="0.0.0.0", api_keys_env="AFT_RAY_TEST_SOME_KEYS")
    )
    bound: Any = app._bound_deployment.init_args
    assert bound[1] == (digest("key-one"), digest("key-two"))
    assert b"key-one" not in pickle.dumps(bound[:2])


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("Bearer key-one", True), ("bearer key-one ", True), ("Bearer key", False), ("key-one", False), (None, False)],
)
def test_only_a_bearer_header_with_an_accepted_key_is_accepted(header: str | None, accepted: bool) -> None:
    found = KeyRing([digest("key-zero"), digest("key-one")]).find(header)
    assert (None if found is None else found[0]) == ("key-2" if accepted else None)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("::", False)],
)
def test_loopback_hosts_are_recognised(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_replicas_scale_between_their_bounds_and_drain_longer_than_the_longest_request() -> None:
    config = ServingConfig(
        engine=VllmEngineConfig(model="some/model", max_num_seqs=100),
        aggregator=ReplicaConfig(min_replicas=2, max_replicas=8, num_gpus=1, upscale_delay_s=1, downscale_delay_s=20),
    )
    assert config.engine is not None
    options = pool_options(config, "aggregator", config.engine, config.aggregator)
    found = AutoscalingConfig(**options["autoscaling_config"])
    assert (found.min_replicas, found.initial_replicas, found.max_replicas) == (2, 2, 8)
    assert (found.upscale_delay_s, found.downscale_delay_s) == (1, 20)
    assert found.policy.policy_kwargs == {"target_samples": 70, "samples_per_request": 5}
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert options["graceful_shutdown_timeout_s"] > LONGEST_REQUEST_S


@pytest.mark.parametrize(
    ("samples", "waiting", "replicas"), [([], 0, 0), ([30, 41], 0, 2), ([69], 0, 1), ([70], 14, 2), ([0, 0], 0, 0)]
)
def test_a_pool_has_as_many_replicas_as_its_samples_need(samples: list[int], waiting: int, replicas: int) -> None:
    context = AutoscalingContext(
        **dict.fromkeys(signature(AutoscalingContext).parameters)
        | {
            "aggregated_metrics": {"num_samples": dict(enumerate(samples))},
            "total_queued_requests": waiting,
            "policy_state": {},
        }
    )
    assert BySamples(target_samples=70, samples_per_request=5)(context) == (replicas, {})


def test_what_the_controller_runs_needs_nothing_of_this_package() -> None:
    """Serve's controller may run where the package is not installed."""
    source = Path(scaling.__file__).read_text()
    assert "aft_ray" not in {name.split(".")[0] for name in imported(source)}


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"aggregator": {"max_replicas": 16}, "admission": {"max_requests": 500}},
            "aggregator.max_replicas 16: .* 538",
        ),
        ({"aggregator": {"max_replicas": 2, "max_ongoing_requests": 8}}, "aggregator.max_ongoing_requests 8"),
        ({"ingress": {"max_replicas": 8, "max_ongoing_requests": 1000}}, "ingress.max_replicas 8: .* 700"),
        ({"ingress": {"target_samples": 5}}, "the ingress writes none"),
        ({"aggregator": {"target_ongoing_requests": 5}}, "engines scale by samples"),
    ],
)
def test_replicas_that_could_never_be_reached_are_refused(changes: dict[str, Any], message: str) -> None:
    vllm = {"type": "vllm", "model": "some/model"}
    with pytest.raises(ConfigError, match=rf"serving\.{message}" if "." in message[:12] else message):
        build_app({"engine": vllm, **changes})


def test_a_missing_adapter_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serving\.adapters\.aft: .*no adapter_config\.json"):
        check_adapters({"aft": str(tmp_path)}, TransformersEngineConfig(model="never-loaded"))


def test_an_application_that_cannot_start_says_what_its_replica_said(served: tuple[str, str]) -> None:
    config = ServingConfig(
        engine=TransformersEngineConfig(model="never-loaded"),
        adapters={"aft": "/nowhere"},
        port=0,
        route_prefix="/broken",
        ingress=ReplicaConfig(num_cpus=0),
        aggregator=ReplicaConfig(num_cpus=0.1),
    )
    with pytest.raises(EngineError, match=r"serving\.adapters\.aft: adapter /nowhere: no adapter_config\.json"):
        serve_app(config, name="broken")


def test_a_second_address_in_one_cluster_is_refused(served: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="one cluster has one HTTP address"):
        serve_app(ServingConfig(engine=ScriptedEngineConfig(), port=1), name="elsewhere")


def test_a_default_plan_within_the_caps_is_accepted() -> None:
    short = Sampling(max_tokens=50)
    plan = Plan(proposal=short, aggregation=(short,), final=short)
    application(ServingConfig(engine=ScriptedEngineConfig(), plan=plan, max_tokens=50))


def test_a_replicas_own_error_keeps_its_class_and_loses_the_remote_traceback() -> None:
    from ray.exceptions import RayTaskError

    remote = RayTaskError("generate", "Traceback: secret", QuorumNotMet("2 of 5")).as_instanceof_cause()
    assert isinstance(as_aft_error(remote), QuorumNotMet)
    assert str(as_aft_error(remote)) == "2 of 5"
    other = as_aft_error(RayTaskError("generate", "Traceback: secret", KeyError("x")).as_instanceof_cause())
    assert isinstance(other, EngineError)
    assert "secret" not in str(other)
