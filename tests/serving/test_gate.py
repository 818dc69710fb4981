"""A gate and a control actor that starts late: no admitted request is forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aft_ray.config import AdmissionConfig, KeyLimits, ScriptedEngineConfig, ServingConfig
from aft_ray.serving.limits.admission import Ticket
from aft_ray.serving.limits.control import Control
from aft_ray.serving.limits.gate import ControlActorClient, Gate

NUM_REQUESTS = 3


def test_a_renewal_that_waited_for_a_new_actor_reports_what_is_open_then(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests that are open when the actor appears are not those that were open when the wait began."""
    import ray
    from ray import serve

    actor = ray.remote(num_cpus=0)(Control).remote(AdmissionConfig(), {})  # type: ignore[attr-defined]
    ray.get(actor.open_requests.remote())
    found: list[Any] = []

    def get_deployment_actor(name: str) -> Any:
        if not found:
            raise ValueError(f"no actor is named {name}")
        return found[0]

    monkeypatch.setattr(serve, "get_deployment_actor", get_deployment_actor)

    async def main() -> tuple[dict[str, Any], dict[str, Any]]:
        gate = Gate(ControlActorClient(), ServingConfig(engine=ScriptedEngineConfig()))
        renewal = asyncio.create_task(gate.renew())
        await asyncio.sleep(0.5)
        found.append(actor)
        for number in range(NUM_REQUESTS):
            await gate.enter(Ticket(id=str(number), key="alice", num_tokens=10), KeyLimits(), [])
        before = await gate.open_requests()
        await renewal
        return before, await gate.open_requests()

    before, after = asyncio.run(main())
    assert before["num_requests"] == after["num_requests"] == NUM_REQUESTS
