"""Nodes on AWS for Ray's autoscaler: spot instances, and on-demand ones while there is no spot capacity.

    provider: {type: external, module: aft_ray.aws_nodes.SpotFirst, region: us-west-2}      (cluster.yaml)

Ray 2.60 asks for spot capacity again and again: neither autoscaler takes another node type after a failed launch
(ray/autoscaler/v2/instance_manager/subscribers/cloud_resource_monitor.py hears of timeouts only). And without a
security group of the given name it makes one that lets everybody try the SSH port, so a missing one is an error here.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider, make_ec2_resource
from ray.autoscaler.node_launch_exception import NodeLaunchException

from aft_ray.errors import ConfigError

NO_SPOT_CAPACITY = frozenset(
    {
        "InsufficientInstanceCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
    }
)
"""Codes of EC2 for a spot request that an on-demand request may still fulfil."""


class SpotFirst(AWSNodeProvider):
    """Ray's provider for AWS. A node type with `InstanceMarketOptions` is launched without them when spot has none."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if "InstanceMarketOptions" not in node_config or error.category not in NO_SPOT_CAPACITY:
                raise
            print(f"no spot capacity for {node_config['InstanceType']} ({error.category}): on demand", flush=True)
        on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
        return super().create_node(on_demand, tags, count)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        check_security_group(cluster_config["provider"])
        return AWSNodeProvider.bootstrap_config(cluster_config)


def check_security_group(provider: dict[str, Any]) -> None:
    """Raise ConfigError unless the security group that the cluster names is there."""
    name = provider["security_group"]["GroupName"]
    ec2 = make_ec2_resource(provider["region"], 5, provider.get("aws_credentials"))
    if not list(ec2.security_groups.filter(Filters=[{"Name": "group-name", "Values": [name]}])):
        raise ConfigError(
            f"no security group {name} in {provider['region']}: create the stack of deploy/aws/account.yaml first "
            "(docs/deploy.md)"
        )
