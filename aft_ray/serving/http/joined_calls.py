"""The runs of one request for several prompts, read as one run that has all their answers.

    prompts A, B with n=2, K=3        final answers  A0 A1 B0 B1 -> 0 1 2 3        drafts  A0 A1 A2 B0 B1 B2 -> 0 ... 5

Each prompt has a run, a place in admission and a bill of its own. The first one that fails ends the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence

from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerUsage, ProposalDone
from aft_ray.inference.plan import Plan
from aft_ray.serving.running_call import RunningCall


class JoinedCalls:
    """Reads several runs of one plan as a `RunningCall` reads one."""

    def __init__(self, runs: Sequence[RunningCall], plan: Plan, num_choices: int) -> None:
        self._runs = runs
        self._plan, self._num_choices = plan, num_choices
        self._finished: dict[int, Finished] = {}
        self._inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._pass_on(place, run)) for place, run in enumerate(runs)]

    async def next(self, patience_s: float | None) -> Event | None:
        """Return the next event, or None when there is none for so long. Raises what ended one of the runs."""
        try:
            async with asyncio.timeout(patience_s if self._inbox.empty() else None):
                item = await self._inbox.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the runs that have not ended: nobody reads them any more."""
        for task in self._tasks:
            task.cancel()
        for run in self._runs:
            run.stop()

    async def _pass_on(self, place: int, run: RunningCall) -> None:
        try:
            while (event := await run.next(None)) is not None:
                self._take(place, event)
                if isinstance(event, Finished):
                    return
        except Exception as error:  # passed on to the reader of the inbox, which raises it
            self._inbox.put_nowait(error)

    def _take(self, place: int, event: Event) -> None:
        """Pass an event on with its place among all answers; the end is passed on when all runs have ended."""
        match event:
            case AnswerDelta():
                event = dataclasses.replace(event, index=place * self._num_choices + event.index)
            case ProposalDone():
                event = ProposalDone(answer=self._placed(place, event.answer))
            case Finished():
                self._finished[place] = event
                if len(self._finished) < len(self._runs):
                    return
                event = self._whole()
        self._inbox.put_nowait(event)

    def _placed(self, place: int, answer: Answer) -> Answer:
        plan = self._plan
        width = self._num_choices if answer.layer == plan.num_layers else plan.num_proposals
        return dataclasses.replace(
            answer,
            index=place * width + answer.index,
            inputs=tuple(place * plan.num_proposals + index for index in answer.inputs),
        )

    def _whole(self) -> Finished:
        runs = [self._finished[place] for place in range(len(self._runs))]
        answers = tuple(self._placed(place, answer) for place, run in enumerate(runs) for answer in run.layers[-1])
        usage = tuple(summed(layers) for layers in zip(*(run.usage for run in runs), strict=True))
        return Finished(answer=answers[0], layers=(answers,), usage=usage, messages=())


def summed(layers: Iterable[LayerUsage]) -> LayerUsage:
    """Return the usage of one layer in several runs, which went on at the same time."""
    first, *others = layers
    for other in others:
        counts = {
            field.name: getattr(first, field.name) + getattr(other, field.name)
            for field in dataclasses.fields(LayerUsage)
            if field.name not in ("layer", "seconds", "decided_by")
        }
        decided_by = first.decided_by if first.decided_by == other.decided_by else "model"
        first = dataclasses.replace(first, **counts, seconds=max(first.seconds, other.seconds), decided_by=decided_by)
    return first
