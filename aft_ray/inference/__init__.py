"""Propose-and-aggregate, written once: one async generator of events over any `Engine`. Knows nothing of Ray.

    async for event in propose_and_aggregate(prompt_id="p-1", messages=messages, plan=Plan(num_layers=2), ...):
        ...

`plan.py` fixes a run, `events.py` is what it tells, `role.py` who answers, `calls.py` what each layer asks the engine,
`layer.py` one layer with its usage, quorum and stragglers, `propose_aggregate.py` the loop over the layers, `fan_in.py`
the one piece of concurrency under all of it.
"""

from __future__ import annotations

from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.inference.plan import FinalLayer, Plan
from aft_ray.inference.propose_aggregate import propose_and_aggregate, run_to_end
from aft_ray.inference.role import Role

__all__ = [
    "Answer",
    "AnswerDelta",
    "Event",
    "FinalLayer",
    "Finished",
    "LayerDone",
    "LayerUsage",
    "Plan",
    "ProposalDone",
    "Role",
    "propose_and_aggregate",
    "run_to_end",
]
