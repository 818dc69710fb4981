"""Several models write their shares of the drafts for one aggregator, over real HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from aft_ray.config import ProposerPoolConfig, ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop

SMALL = ReplicaConfig(num_cpus=0.1)


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    def proposer(name: str, share: float) -> ProposerPoolConfig:
        return ProposerPoolConfig(
            name=name, engine=ScriptedEngineConfig(answers=(f"draft of {name}",)), share=share, replicas=SMALL
        )

    config = ServingConfig(
        engine=ScriptedEngineConfig(answers=("written by the aggregator",)),
        proposers=(proposer("large", 3), proposer("small", 1)),
        topology="split",
        plan=Plan(num_proposals=4, num_layers=1),
        port=0,
        route_prefix="/several",
        ingress=SMALL,
        aggregator=SMALL,
    )
    yield serve_app(config, name="several")
    stop("several")


@pytest.mark.parametrize(
    ("num_proposals", "shares"),
    [
        (8, {"draft of large": 6, "draft of small": 2}),
        (4, {"draft of large": 3, "draft of small": 1}),
        (2, {"draft of large": 2}),
    ],
)
def test_each_proposer_writes_its_share_of_the_drafts(url: str, num_proposals: int, shares: dict[str, int]) -> None:
    """At K=2 the smaller share is half a draft; the largest remainder is rounded up, the first one in a tie."""
    aft = {"num_proposals": num_proposals, "include_proposals": True}
    body = {"messages": [{"role": "user", "content": "Name three rivers."}], "aft": aft}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    drafts, final = reply["aft"]["layers"]
    assert Counter(draft["text"] for draft in drafts) == shares
    assert [answer["text"] for answer in final] == ["written by the aggregator"]
    assert reply["usage"]["aft"]["layers"][0]["num_answers"] == num_proposals


def test_a_single_sample_is_written_by_the_largest_proposer(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "Name three rivers."}], "aft": {"num_layers": 0}}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert reply["choices"][0]["message"]["content"] == "draft of large"
