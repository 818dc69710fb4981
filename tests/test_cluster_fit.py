"""What a cluster can hold, from its nodes and from the node types of its autoscaler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aft_ray.cluster_fit import NodeType, check_fits, num_held, read_types, resources_of_worker, shown
from aft_ray.errors import ConfigError

H100 = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0}


@pytest.mark.parametrize(
    "wanted, held",
    [
        (resources_of_worker(1, 1, None), 4),
        (resources_of_worker(3, 0, None), 2),
        (resources_of_worker(1, 0.1, "H100"), 8),
        (resources_of_worker(1, 4, "H100"), 1),
        (resources_of_worker(1, 5, None), 0),
        (resources_of_worker(1, 1, "B200"), 0),
    ],
)
def test_a_node_holds_as_many_workers_as_its_scarcest_resource_allows(wanted: dict[str, float], held: int) -> None:
    assert num_held(H100, wanted) == held


def config(tmp_path: Path, **types: Any) -> Path:
    file = tmp_path / "autoscaler.yaml"
    file.write_text(json.dumps({"max_workers": 3, "head_node_type": "head", "available_node_types": types}))
    return file


def test_node_types_are_read_with_their_limits(tmp_path: Path) -> None:
    file = config(tmp_path, head={"resources": {"CPU": 4}}, l40s={"resources": {"GPU": 1}, "max_workers": 8}, other={})
    assert read_types(file) == [
        NodeType(name="l40s", resources={"GPU": 1}, max_nodes=3),  # the cluster's own limit is 3
        NodeType(name="other", resources={}, max_nodes=3),
    ]


@pytest.mark.parametrize("text", ["", "[1]", "{", "provider: {type: aws}"])
def test_a_configuration_without_node_types_says_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "autoscaler.yaml"
    file.write_text(text)
    assert read_types(file) is None
    assert read_types(tmp_path / "not there") is None


def test_resources_are_shown_in_words() -> None:
    assert shown({**H100, "memory": 1e9, "node:10.0.0.1": 1.0}) == "8 CPU, 4 GPU, H100"
    assert shown({"node:10.0.0.1": 1.0}) == "nothing"


def test_what_the_cluster_can_never_hold_is_refused_with_what_there_is(ray_cluster: None) -> None:
    check_fits("targets.placement", {"CPU": 4}, num_workers=1)
    with pytest.raises(ConfigError, match=r"targets\.placement requests 5 CPU per worker, and no node has that\. The"):
        check_fits("targets.placement", {"CPU": 5})
    with pytest.raises(ConfigError, match="requests 2 CPU per worker for 3 workers at a time, and the cluster holds 2"):
        check_fits("training", {"CPU": 2}, num_workers=3)
