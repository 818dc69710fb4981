"""One layer: its calls run side by side, every answer and token is counted, stragglers may be cut.

A call is one `GenerateRequest`; its n samples fill n slots of the layer. The layer is over when every slot has ended,
or, once the draft deadline has passed, when enough slots hold a usable answer: closing the calls then aborts the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from aft_ray.engines.base import Engine, EngineEvent, GenerateRequest, Sample, TokenDelta
from aft_ray.errors import EngineError
from aft_ray.inference.events import Answer, LayerUsage
from aft_ray.inference.fan_in import Tell, Writer, fan_in

EMPTY_ANSWER = "empty answer"
"""`Answer.error` of an answer without text: there is nothing in it to aggregate."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One answer that a layer must write."""

    index: int
    inputs: tuple[int, ...] = ()
    """Indices of the answers of the layer below that it is shown, in the order shown."""
    length_action: str | None = None
    """What the length policy did to its inputs."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to an engine and the slots its samples fill: sample i fills `slots[i]`."""

    engine: Engine
    request: GenerateRequest
    slots: tuple[Slot, ...]


class Ledger:
    """Who has answered what in one layer, and what it cost.

    A slot may be worked on by two calls at once (`Plan.hedge_s`): the first usable answer fills it, and it fails only
    when no call is left that could still fill it.
    """

    def __init__(self, layer: int, calls: Sequence[Call]) -> None:
        self.layer = layer
        self.usable: dict[int, Answer] = {}
        self.failed: list[Answer] = []
        """Failed and empty answers, in the order they ended."""
        self.unfinished: dict[int, list[Call]] = {}
        """By slot, the calls that may still fill it."""
        self._num_tokens_seen: Counter[tuple[str, int]] = Counter()
        """Tokens of what has not become an answer, by request and slot: all that is known of what is never finished."""
        self._sent: dict[tuple[str, int], bool] = {}
        """The same pairs: a prompt was sent for each. Whether the engine has said how that ended."""
        self._num_prompt_tokens: dict[str, int] = {}
        self._num_slots_written: Counter[str] = Counter()
        self._started = time.monotonic()
        for call in calls:
            self.begin(call)

    def begin(self, call: Call) -> None:
        """A call is sent for its slots."""
        self._num_prompt_tokens[call.request.request_id] = len(call.request.prompt_ids)
        for slot in call.slots:
            self.unfinished.setdefault(slot.index, []).append(call)
            self._sent[call.request.request_id, slot.index] = False

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The usable answers, by index: in an order that does not depend on who was faster."""
        return tuple(self.usable[index] for index in sorted(self.usable))

    def take(self, call: Call, event: EngineEvent | EngineError) -> list[Answer]:
        """Count one event of a call and return the answers it ended. An EngineError ends all the call has left."""
        if isinstance(event, TokenDelta):
            self._num_tokens_seen[call.request.request_id, call.slots[event.index].index] += event.num_tokens
            return []
        if isinstance(event, Sample):
            if event.num_prompt_tokens:
                self._num_prompt_tokens[call.request.request_id] = event.num_prompt_tokens
            slot = call.slots[event.index]
            self._num_slots_written[call.request.request_id] += 1
            return self._end(call, self._answer_of(call, slot, event))
        left = [slot for slot in call.slots if not self._sent.get((call.request.request_id, slot.index), True)]
        has_begun = self._num_slots_written[call.request.request_id] or any(
            self._num_tokens_seen[call.request.request_id, slot.index] for slot in left
        )
        num_sent = self._num_prompt_tokens[call.request.request_id] if has_begun else 0  # refused at once: cost nothing
        return [answer for slot in left for answer in self._end(call, self._answer_lost(call, slot, num_sent, event))]

    def usage(self) -> LayerUsage:
        """Tokens and seconds so far. What is unfinished counts as cancelled, with the tokens known of it."""
        ended = [*self.usable.values(), *self.failed]
        return LayerUsage(
            layer=self.layer,
            prompt_tokens=sum(a.num_prompt_tokens for a in ended)
            + sum(self._num_prompt_tokens[request_id] for request_id, _ in self._sent),
            completion_tokens=sum(a.num_tokens for a in ended) + sum(self._num_tokens_seen.values()),
            cached_tokens=sum(a.num_cached_tokens for a in ended),
            num_answers=len(self.usable),
            num_failed=len(self.failed),
            num_cancelled=sum(not has_ended for has_ended in self._sent.values()),
            seconds=time.monotonic() - self._started,
        )

    def _end(self, call: Call, answer: Answer) -> list[Answer]:
        """The answer fills its slot, unless it came too late or another call may still do better."""
        pair = (call.request.request_id, answer.index)
        rivals = [other for other in self.unfinished.get(answer.index, []) if other is not call]
        if answer.index not in self.unfinished or (answer.error is not None and rivals):
            self._num_tokens_seen[pair] = answer.num_tokens
            self._sent[pair] = True
            if not answer.num_prompt_tokens:
                del self._sent[pair]
            if answer.index in self.unfinished:
                self.unfinished[answer.index] = rivals
            return []
        del self.unfinished[answer.index]
        self._sent.pop(pair)
        # an answer that was lost and begun again has cost more than its own tokens
        self._num_tokens_seen[pair] = max(0, self._num_tokens_seen[pair] - answer.num_tokens)
        if answer.error is None:
            self.usable[answer.index] = answer
        else:
            self.failed.append(answer)
        return [answer]

    def _num_seen(self, call: Call, slot: Slot, sample: Sample) -> int:
        """A failed answer's tokens: it may report none."""
        return max(sample.num_tokens, self._num_tokens_seen[call.request.request_id, slot.index])

    def _answer_of(self, call: Call, slot: Slot, sample: Sample) -> Answer:
        return Answer(
            layer=self.layer,
            index=slot.index,
            text=sample.text,
            finish_reason=sample.finish_reason,
            num_prompt_tokens=sample.num_prompt_tokens,
            num_tokens=sample.num_tokens if sample.error is None else self._num_seen(call, slot, sample),
            num_cached_tokens=sample.num_cached_tokens,
            seed=sample.seed,
            logprobs=sample.logprobs,
            error=sample.error if sample.error is not None or sample.text.strip() else EMPTY_ANSWER,
            inputs=slot.inputs,
            length_action=slot.length_action,
        )

    def _answer_lost(self, call: Call, slot: Slot, num_prompt_tokens: int, error: EngineError) -> Answer:
        return Answer(
            layer=self.layer,
            index=slot.index,
            text="",
            finish_reason="error",
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=self._num_tokens_seen[call.request.request_id, slot.index],
            error=str(error),
            inputs=slot.inputs,
            length_action=slot.length_action,
        )


async def run_layer(
    calls: Sequence[Call],
    ledger: Ledger,
    quorum: int,
    draft_deadline_s: float | None,
    watch: Callable[[TokenDelta | Answer], None],
    hedge_s: float | None = None,
) -> None:
    """Fill the ledger. `watch` is told each piece of text as it is made (of which slot) and each answer as it ends."""
    writers: list[Writer[Any]] = [partial(_answer_call, call) for call in calls]
    if draft_deadline_s is not None:
        writers.append(partial(_ring, draft_deadline_s))
    if hedge_s is not None:
        writers += [partial(_hedge, call, ledger, hedge_s) for call in calls]
    is_late = False
    async with aclosing(fan_in(writers)) as told:
        async for item in told:
            if isinstance(item, _DraftDeadline):
                is_late = True
            else:
                call, event = item
                if isinstance(event, TokenDelta):
                    watch(dataclasses.replace(event, index=call.slots[event.index].index))
                for answer in ledger.take(call, event):
                    watch(answer)
            if not ledger.unfinished or (is_late and len(ledger.usable) >= quorum):
                return


async def _answer_call(call: Call, tell: Tell[tuple[Call, EngineEvent | EngineError]]) -> None:
    """Tell the call's events; last comes what to say of slots that never got an answer (none, as a rule)."""
    try:
        async with aclosing(call.engine.generate(call.request)) as events:
            async for event in events:
                tell((call, event))
    except EngineError as error:
        tell((call, error))
    else:
        tell((call, EngineError("the engine ended the request without answering")))


async def _hedge(
    call: Call, ledger: Ledger, seconds: float, tell: Tell[tuple[Call, EngineEvent | EngineError]]
) -> None:
    """After `seconds`, ask again, with the same seeds, for what is unwritten: another replica may be faster."""
    await asyncio.sleep(seconds)
    left = [number for number, slot in enumerate(call.slots) if slot.index in ledger.unfinished]
    if not left:
        return
    request = dataclasses.replace(
        call.request,
        request_id=f"{call.request.request_id}/hedge",
        seeds=tuple(call.request.seeds[number] for number in left),
    )
    again = Call(engine=call.engine, request=request, slots=tuple(call.slots[number] for number in left))
    ledger.begin(again)
    await _answer_call(again, tell)


@dataclass(frozen=True)
class _DraftDeadline:
    """The draft deadline has passed."""


async def _ring(seconds: float, tell: Tell[_DraftDeadline]) -> None:
    await asyncio.sleep(seconds)
    tell(_DraftDeadline())
