"""Propose-and-aggregate, written once: one async generator of events over any `Engine`. Knows nothing of Ray.

    async for event in propose_and_aggregate(prompt_id="p-1", messages=messages, plan=Plan(num_layers=2), ...):
        ...

The files of the room:

    plan.py               everything that fixes a run: width, depth, sampling, deadlines
    role.py               which model, adapter and prompt format answer
    events.py             the events of a run
    propose_aggregate.py  the loop over the layers
    run.py                what all layers of one run share
    calls.py              the engine requests of a layer: prompts, slots, seeds
    shares.py             how many drafts each of several proposers writes
    layer.py              one layer: its usage, quorum and stragglers
    agreement.py          early stop and majority vote
    answers.py            the answer within a longer text
    numbers.py            numbers as people and models write them
    off_loop.py           tokenizing of long texts in a thread
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
