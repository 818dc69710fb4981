"""cluster.yaml and its twins: Ray's own code reads them, and starts them on a mocked cloud where there is one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from aft_ray.cluster_fit import NodeType, num_held, read_types, resources_of_worker
from aft_ray.config import load_config
from aft_ray.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
FILES = {"aws": ROOT / "cluster.yaml", "gcp": ROOT / "deploy" / "gcp.yaml", "azure": ROOT / "deploy" / "azure.yaml"}
REGION = "us-west-2"
ME = "203.0.113.7/32"
TEMPLATE = ROOT / "deploy" / "aws" / "account.yaml"


def read(cloud: str) -> dict[str, Any]:
    return yaml.safe_load(FILES[cloud].read_text())


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def test_ray_takes_the_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert not any("pip install -U" in command for command in prepared[key]), "Ray's own default, without a lock"


def test_every_node_asks_for_the_token_and_the_dashboard_stays_on_loopback(cluster: dict[str, Any]) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = (command for command in commands if "ray start" in command)
        assert "export RAY_AUTH_MODE=token;" in start
        assert "USE_GRPC" not in start, "over gRPC, Serve notices a lost host after minutes"
        assert "0.0.0.0" not in start
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "a path, never the token itself"


def test_nodes_get_the_package_and_its_locks_and_nothing_else(cluster: dict[str, Any]) -> None:
    mounts = {local for local in cluster["file_mounts"].values() if not local.startswith("~")}
    assert mounts == {"aft_ray", "requirements", "Makefile", "pyproject.toml", "README.md"}
    assert all((ROOT / local).exists() for local in mounts)
    assert any("make setup DEVICE=gpu" in command for command in cluster["setup_commands"])


def test_the_head_runs_no_work_and_the_number_of_nodes_is_capped(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "aft_autoscaling": 1}
    assert head["max_workers"] == 0
    workers = {name: kind for name, kind in cluster["available_node_types"].items() if name != "head"}
    assert all(kind.get("min_workers", 0) == 0 and kind["max_workers"] > 0 for kind in workers.values())
    assert 0 < cluster["max_workers"] <= 4
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert cluster["provider"]["cache_stopped_nodes"] is False


PRICED = re.compile(r"[Aa]t most ([\d.+ x]+) = (\d+) an hour")


@pytest.mark.parametrize("cloud", FILES)
def test_the_price_beside_the_cap_is_that_of_the_dearest_nodes(cloud: str) -> None:
    text = FILES[cloud].read_text().replace("\n#", "")
    found = PRICED.search(text)
    assert found is not None
    said = sum(math.prod(map(float, term.split("x"))) for term in found[1].split("+"))
    prices = {name: float(price) for name, price in re.findall(r"\b(head|cpu_worker|gpu_\d) (\d+(?:\.\d+)?)", text)}
    cluster = read(cloud)
    types = cluster["available_node_types"].items()
    dearest = sorted((prices[name] for name, kind in types for _ in range(kind["max_workers"])), reverse=True)
    assert said == pytest.approx(prices["head"] + sum(dearest[: cluster["max_workers"]]))
    assert int(found[2]) == round(said)


# ── AWS, against moto ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mocked AWS account that is empty but for its default VPC, and a home without keys. Yields boto3."""
    moto = pytest.importorskip("moto", reason="make storage installs moto")
    pytest.importorskip("aws_xray_sdk", reason="make deploy-tools installs what moto needs for CloudFormation")
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "no secret")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        with moto.mock_aws():
            yield boto3


@pytest.fixture(scope="module")
def bootstrapped(account: Any) -> dict[str, Any]:
    """What `ray up` makes of cluster.yaml before it starts the head, in an account with the stack."""
    from ray.autoscaler._private.commands import _bootstrap_config

    vpc = account.client("ec2").describe_vpcs()["Vpcs"][0]["VpcId"]
    chosen = {"SshFrom": ME, "VpcId": vpc, "Bucket": "my-aft-runs"}
    account.client("cloudformation").create_stack(
        StackName="aft-ray",
        TemplateBody=TEMPLATE.read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in chosen.items()],
    )
    return _bootstrap_config(read("aws"), no_config_cache=True)


def test_the_template_of_the_account_passes_amazons_linter() -> None:
    api = pytest.importorskip("cfnlint.api", reason="make deploy-tools installs cfn-lint")
    assert [str(match) for match in api.lint(TEMPLATE.read_text(), regions=[REGION])] == []
    to_everybody = TEMPLATE.read_text().replace("!Ref SshFrom", "0.0.0.0/33")
    assert api.lint(to_everybody, regions=[REGION]), "it does find faults"


def test_without_the_stack_nothing_starts_and_no_port_is_opened(account: Any) -> None:
    from aft_ray.aws_nodes import SpotFirst

    with pytest.raises(ConfigError, match=r"no security group aft-ray in us-west-2: create the stack"):
        SpotFirst.bootstrap_config(prepare_config(read("aws")))
    groups = account.client("ec2").describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in groups] == ["default"]


def test_ray_up_uses_the_closed_group_the_roles_and_the_newest_images(
    account: Any, bootstrapped: dict[str, Any]
) -> None:
    (group,) = account.client("ec2").describe_security_groups(GroupNames=["aft-ray"])["SecurityGroups"]
    opened = [
        (rule.get("FromPort"), ranges["CidrIp"]) for rule in group["IpPermissions"] for ranges in rule["IpRanges"]
    ]
    assert opened == [(22, ME)], "SSH from the named address, nothing else from outside, also after Ray's own set-up"
    among = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert among == [group["GroupId"]]
    for name, kind in bootstrapped["available_node_types"].items():
        node = kind["node_config"]
        assert node["SecurityGroupIds"] == [group["GroupId"]]
        assert node["IamInstanceProfile"] == {"Name": "aft-ray-head" if name == "head" else "aft-ray-worker"}
        family = "ubuntu-24.04/latest" if name.startswith("gpu") else "canonical/ubuntu/server/24.04/stable/current"
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/")
        assert family in node["ImageId"]
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
        assert ("InstanceMarketOptions" in node) == (name != "head")


def test_the_node_types_hold_the_workers_of_the_configs(bootstrapped: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "bootstrapped.json"
    file.write_text(json.dumps(bootstrapped))
    types = read_types(file)
    assert types is not None
    shapes = {kind.name: (kind.resources.get("GPU", 0), kind.max_nodes) for kind in types}
    assert shapes == {"cpu_worker": (0, 2), "gpu_1": (1, 4), "gpu_4": (4, 3), "gpu_8": (8, 1)}
    teacher = load_config(ROOT / "configs" / "llama_8b_gpu.yaml").targets.engine
    assert teacher is not None and teacher.type == "vllm"
    for accelerator in ("L40S", "H100", None):
        wanted = resources_of_worker(1, teacher.tensor_parallel_size, accelerator)
        assert holding(types, wanted), accelerator
    assert not holding(types, resources_of_worker(1, 1, "A100"))


def holding(types: list[NodeType], wanted: dict[str, float]) -> list[str]:
    return [kind.name for kind in types if num_held(kind.resources, wanted)]


def launch(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, refusal: str | None) -> list[dict[str, Any]]:
    """Launch a node of type gpu_1, where spot requests are refused with this code. Return the requests that EC2 got."""
    from botocore.exceptions import ClientError
    from ray.autoscaler._private.providers import _get_node_provider

    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    create, asked = provider.ec2_fail_fast.create_instances, []

    def create_instances(**request: Any) -> Any:
        asked.append(request)
        if refusal and "InstanceMarketOptions" in request:
            raise ClientError({"Error": {"Code": refusal, "Message": "no"}}, "RunInstances")
        return create(**{**request, "ImageId": "ami-12c6146b"})  # moto does not know Amazon's SSM parameters

    monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", create_instances)
    node = config["available_node_types"]["gpu_1"]["node_config"]
    created = provider.create_node(node, {"ray-node-type": "worker"}, 1)
    assert set(created) <= set(provider.non_terminated_nodes({}))
    return asked


def test_workers_are_spot_instances(bootstrapped: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = launch(bootstrapped, monkeypatch, refusal=None)
    assert [request["InstanceMarketOptions"] for request in asked] == [{"MarketType": "spot"}]


def test_where_spot_has_no_capacity_in_any_zone_workers_are_on_demand(
    bootstrapped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = launch(bootstrapped, monkeypatch, refusal="InsufficientInstanceCapacity")
    *spot, last = asked
    assert all("InstanceMarketOptions" in request for request in spot)
    subnets = bootstrapped["available_node_types"]["gpu_1"]["node_config"]["SubnetIds"]
    assert {request["SubnetId"] for request in spot} == set(subnets)
    assert "InstanceMarketOptions" not in last
    assert last["InstanceType"] == "g6e.2xlarge"


def test_another_error_is_not_answered_by_a_dearer_request(
    bootstrapped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    with pytest.raises(NodeLaunchException) as caught:
        launch(bootstrapped, monkeypatch, refusal="VcpuLimitExceeded")
    assert caught.value.category == "VcpuLimitExceeded"


def allowed(policy: dict[str, Any]) -> set[str]:
    actions = [one["Action"] for one in policy["Statement"]]
    return {action for some in actions for action in ([some] if isinstance(some, str) else some)}


def resources_of_template() -> dict[str, Any]:
    decode = pytest.importorskip("cfnlint.decode.cfn_yaml", reason="make deploy-tools installs cfn-lint")
    return decode.loads(TEMPLATE.read_text())["Resources"]


def policy_of(who: str) -> dict[str, Any]:
    """Return what the launcher, or the head, may do."""
    if who == "launcher":
        return json.loads((ROOT / "deploy" / "aws" / "launcher-policy.json").read_text())
    (inline,) = resources_of_template()["HeadRole"]["Properties"]["Policies"]
    return in_account(inline["PolicyDocument"])


def in_account(part: Any) -> Any:
    """Return a part of the template as it is in the mocked account, for the functions that its policies use."""
    if isinstance(part, list):
        return [in_account(one) for one in part]
    if not isinstance(part, dict):
        return part
    match list(part.items()):
        case [("Fn::Sub", text)]:
            return text.replace("${AWS::Partition}", "aws").replace("${AWS::AccountId}", "123456789012")
        case [("Fn::GetAtt", ["WorkerRole", "Arn"])]:
            return "arn:aws:iam::123456789012:role/aft-ray-worker"
        case items:
            return {key: in_account(value) for key, value in items}


def test_the_policies_name_what_ray_calls_and_no_more() -> None:
    resources = resources_of_template()
    launcher, head = policy_of("launcher"), policy_of("head")
    instances = {"ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags"}
    instances |= {f"ec2:{verb}Instances" for verb in ("Terminate", "Stop", "Start")}
    shared = instances | {"ssm:GetParameters", "iam:PassRole"}
    assert allowed(launcher) == shared | {"ec2:CreateKeyPair"}
    assert allowed(head) == shared | {"iam:CreateServiceLinkedRole"}
    for policy in (launcher, head):
        for one in policy["Statement"]:
            if "ec2:TerminateInstances" in one["Action"]:
                tag = one["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"]
                assert tag == read("aws")["cluster_name"]
            if one["Action"] == "iam:PassRole":
                assert one["Resource"] != "*"
    worker = resources["WorkerRole"]["Properties"]
    assert set(worker) == {"RoleName", "AssumeRolePolicyDocument", "ManagedPolicyArns"}
    assert worker["ManagedPolicyArns"] == [{"Ref": "RunsPolicy"}]
    runs = allowed(resources["RunsPolicy"]["Properties"]["PolicyDocument"])
    assert all(action.startswith("s3:") and "*" not in action for action in runs)


def caller(boto3: Any, name: str, policy: dict[str, Any]) -> dict[str, str]:
    """Return the credentials of a new user who has this policy, on all resources: moto knows no other."""
    iam = boto3.client("iam")
    policy = {**policy, "Statement": [{**statement, "Resource": "*"} for statement in policy["Statement"]]}
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}


@pytest.mark.parametrize("who, node_type", [("launcher", "head"), ("head", "gpu_1")])
def test_the_policies_are_enough_for_what_ray_does(
    account: Any, bootstrapped: dict[str, Any], who: str, node_type: str
) -> None:
    from botocore.exceptions import ClientError
    from moto.core.authorization import enable_iam_authentication

    from aft_ray.aws_nodes import SpotFirst

    credentials = caller(account, who, policy_of(who))
    config = read("aws")
    config["provider"]["aws_credentials"] = credentials
    node = {**bootstrapped["available_node_types"][node_type]["node_config"], "ImageId": "ami-12c6146b"}
    with enable_iam_authentication():
        if who == "launcher":
            account.client("ec2", **credentials).describe_instance_types(InstanceTypes=["m7i.2xlarge"])
            SpotFirst.bootstrap_config(prepare_config(config))
        provider = SpotFirst(config["provider"], "aft-ray")
        (created,) = provider.create_node(node, {"ray-node-type": "x"}, 1)
        assert created in provider.non_terminated_nodes({})
        provider.set_node_tags(created, {"ray-node-status": "up-to-date"})
        provider.terminate_node(created)
        with pytest.raises(ClientError, match=r"Denied|UnauthorizedOperation"):
            account.client("ec2", **credentials).create_security_group(GroupName="open", Description="open")


# ── Google Cloud, against its own description of its API ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def compute() -> dict[str, Any]:
    """Google's description of the Compute Engine API, as its client has it."""
    pytest.importorskip("googleapiclient", reason="make deploy-tools installs Google's client")
    from googleapiclient.discovery_cache import get_static_doc

    return json.loads(get_static_doc("compute", "v1"))


def problems(schemas: dict[str, Any], schema: dict[str, Any], value: Any, at: str) -> Iterator[str]:
    """Yield what of `value` the API does not know: fields, and values of enumerations."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if inner is None:
                yield f"{at}.{key}: no such field"
            else:
                yield from problems(schemas, inner, item, f"{at}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from problems(schemas, schema["items"], item, at)
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value} is none of {schema['enum']}"


def test_google_knows_every_field_of_every_node(compute: dict[str, Any]) -> None:
    schemas = compute["schemas"]
    for name, kind in read("gcp")["available_node_types"].items():
        assert list(problems(schemas, {"$ref": "Instance"}, kind["node_config"], name)) == []
    wrong = {"scheduling": {"provisioningModel": "CHEAP"}, "machine": 1}
    assert len(list(problems(schemas, {"$ref": "Instance"}, wrong, "node"))) == 2


def test_ray_starts_the_cluster_on_google_with_its_own_network(
    compute: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from googleapiclient.discovery import build_from_document
    from googleapiclient.discovery_cache import get_static_doc
    from googleapiclient.http import HttpMock, RequestMockBuilder
    from ray.autoscaler._private.gcp import config as of_ray

    monkeypatch.setenv("HOME", str(tmp_path))
    account = {"email": "ray-autoscaler-sa-v1@my-project.iam.gserviceaccount.com", "projectId": "my-project"}
    project = {"projectId": "my-project", "lifecycleState": "ACTIVE"}
    metadata = {"name": "my-project", "commonInstanceMetadata": {"items": []}}
    answers = {
        "cloudresourcemanager.projects.get": (None, json.dumps(project)),
        "cloudresourcemanager.projects.getIamPolicy": (None, json.dumps({"bindings": []})),
        "cloudresourcemanager.projects.setIamPolicy": (None, "{}"),
        "iam.projects.serviceAccounts.get": (None, json.dumps(account)),
        "compute.projects.get": (None, json.dumps(metadata)),
        "compute.projects.setCommonInstanceMetadata": (None, json.dumps({"name": "operation"})),
        "compute.globalOperations.get": (None, json.dumps({"name": "operation", "status": "DONE"})),
    }
    clients = [
        build_from_document(
            get_static_doc(api, "v1"),
            http=HttpMock(),
            requestBuilder=RequestMockBuilder(answers, check_unexpected=True),
        )
        for api in ("cloudresourcemanager", "iam", "compute")
    ]
    monkeypatch.setattr(of_ray, "construct_clients_from_provider_config", lambda provider: (*clients, None))
    config = of_ray.bootstrap_gcp(prepare_config(read("gcp")))
    for name, kind in config["available_node_types"].items():
        (network,) = kind["node_config"]["networkInterfaces"]
        assert network["subnetwork"].endswith("/subnetworks/aft-ray")
        accounts = kind["node_config"].get("serviceAccounts", [])
        assert [one["email"].partition("@")[0] for one in accounts] == ([] if name == "head" else ["aft-ray-worker"])
    assert config["head_node"]["serviceAccounts"][0]["email"] == account["email"]


# ── Azure, against the templates that Ray deploys ─────────────────────────────────────────────────────────────────────


def test_azure_nodes_set_parameters_of_rays_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_ray = pytest.importorskip(
        "ray.autoscaler._private._azure.config", reason="make deploy-tools installs Azure's SDK"
    )
    from ray.autoscaler._private._azure.node_provider import AzureNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))
    template = json.loads((Path(of_ray.__file__).parent / "azure-vm-template.json").read_text())
    config = of_ray._configure_key_pair(prepare_config(read("azure")))
    for kind in config["available_node_types"].values():
        given = kind["node_config"]["azure_arm_parameters"]
        assert set(given) <= set(template["parameters"])
        for name, value in given.items():
            kind_of_value = {"int": int, "object": dict}.get(template["parameters"][name]["type"], str)
            assert isinstance(value, kind_of_value), name
    assert AzureNodeProvider._parse_availability_zones(AzureNodeProvider, config["provider"]["availability_zone"]) == []
    network = json.loads((Path(of_ray.__file__).parent / "azure-config-template.json").read_text())
    provider = config["provider"]
    name = network["variables"]["nsgName"]
    assert name == "[concat('ray-', parameters('clusterId'), '-nsg')]"
    assert f"ray-{config['cluster_name']}-{provider['unique_id']}-nsg" in FILES["azure"].read_text()
