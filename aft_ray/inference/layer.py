"""One layer: its engine calls run concurrently, every answer and token is counted, stragglers may be cancelled.

An engine call is one `GenerateRequest`; its n samples fill n slots of the layer. The layer is over when every slot has
ended, or, after the draft deadline, when enough slots hold a usable answer. Closing the calls then aborts the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from aft_ray.engines.base import Engine, EngineEvent, GenerateRequest, Sample, TokenDelta
from aft_ray.errors import EngineError
from aft_ray.fan_in import Emit, Writer, fan_in
from aft_ray.inference.events import Answer, LayerUsage
from aft_ray.records import Message, all_text

EMPTY_ANSWER = "empty answer"
"""`Answer.error` of an answer without text, which an aggregator cannot use."""
HEDGE = "/hedge"
"""End of the id of a second request for the same answers."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one answer in a layer."""

    index: int
    inputs: tuple[int, ...] = ()
    """Indices of the answers of the layer below that its prompt shows, in the order shown."""
    length_action: str | None = None
    """What the length policy did to its inputs; None when everything fitted."""


@dataclass(frozen=True, kw_only=True)
class EngineCall:
    """One request to an engine, and the slots that its samples fill: sample i fills `slots[i]`."""

    engine: Engine
    request: GenerateRequest
    slots: tuple[Slot, ...]


class LayerTally:
    """The answers of one layer, and the tokens they cost, while its calls run.

    Two calls may work on one slot (`Plan.hedge_s`): the first usable answer fills it. The slot fails only when no call
    is left that could still fill it.
    """

    def __init__(self, layer: int, calls: Sequence[EngineCall], *, accepts_empty: bool = False) -> None:
        self.layer = layer
        self.accepts_empty = accepts_empty
        """Whether an answer without text fills its slot: for a client it is an answer, for an aggregator it is none."""
        self.usable: dict[int, Answer] = {}
        self.failed: list[Answer] = []
        """Failed and empty answers, in the order they ended."""
        self.unfinished: dict[int, list[EngineCall]] = {}
        """The calls that may still fill a slot, by the slot's index."""
        self._calls: list[EngineCall] = []
        self._ended: dict[tuple[str, int], Answer] = {}
        """How each sample ended, by request and slot, whether or not it filled the slot."""
        self._num_prompt_tokens: dict[str, int] = {}
        """By prompt. Engines that take messages tell it with the first sample; until then it is estimated."""
        self._started = time.monotonic()
        for call in calls:
            self.begin(call)

    def begin(self, call: EngineCall) -> None:
        """Note that a call was sent for its slots."""
        self._calls.append(call)
        request = call.request
        self._num_prompt_tokens.setdefault(
            _prompt_of(call), len(request.prompt_ids) or estimated_tokens(request.messages)
        )
        for slot in call.slots:
            self.unfinished.setdefault(slot.index, []).append(call)

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The usable answers in the order of their slots, which does not depend on which ended first."""
        return tuple(self.usable[index] for index in sorted(self.usable))

    def take(self, call: EngineCall, event: Sample | EngineError) -> list[Answer]:
        """Count the end of one sample of a call, or an EngineError, which ends all that are left of it.

        Returns the answers that filled slots.
        """
        request_id = call.request.request_id
        if isinstance(event, Sample):
            if event.num_prompt_tokens:
                self._num_prompt_tokens[_prompt_of(call)] = event.num_prompt_tokens
            return self._end(call, self._answer_of(call, call.slots[event.index], event))
        left = [n for n, slot in enumerate(call.slots) if (request_id, slot.index) not in self._ended]
        # a request that was refused at once cost nothing
        has_begun = len(left) < len(call.slots) or bool(call.request.written)
        num_sent = self._num_prompt_tokens[_prompt_of(call)] if has_begun else 0
        return [answer for n in left for answer in self._end(call, self._answer_lost(call, n, num_sent, event))]

    def usage(self) -> LayerUsage:
        """Return tokens and seconds so far. Unfinished samples count as cancelled, with the tokens known of them."""
        usage = Counter[str]()
        for call in self._calls:
            for number, slot in enumerate(call.slots):
                answer = self._ended.get((call.request.request_id, slot.index))
                if answer is None:
                    if call.request.written is None or number in call.request.written:  # an engine had begun it
                        usage["prompt"] += self._num_prompt_tokens[_prompt_of(call)]
                    usage["completion"] += _num_written(call, number)
                    usage["cancelled"] += 1
                else:
                    usage["prompt"] += answer.num_prompt_tokens
                    usage["completion"] += answer.num_tokens
                    usage["cached"] += answer.num_cached_tokens
                    usage["reasoning"] += answer.num_reasoning_tokens
        return LayerUsage(
            layer=self.layer,
            prompt_tokens=usage["prompt"],
            completion_tokens=usage["completion"],
            reasoning_tokens=usage["reasoning"],
            cached_tokens=usage["cached"],
            num_answers=len(self.usable),
            num_failed=len(self.failed),
            num_cancelled=usage["cancelled"],
            seconds=time.monotonic() - self._started,
        )

    def _end(self, call: EngineCall, answer: Answer) -> list[Answer]:
        """Fill a slot with an answer, unless it came too late or it failed and another call may still succeed."""
        self._ended[call.request.request_id, answer.index] = answer
        rivals = [other for other in self.unfinished.get(answer.index, []) if other is not call]
        if answer.index not in self.unfinished:
            return []
        if answer.error is not None and rivals:
            self.unfinished[answer.index] = rivals
            return []
        del self.unfinished[answer.index]
        if answer.error is None:
            self.usable[answer.index] = answer
        else:
            self.failed.append(answer)
        return [answer]

    def _answer_of(self, call: EngineCall, slot: Slot, sample: Sample) -> Answer:
        num_tokens = sample.num_tokens
        if sample.error is not None:  # a failed sample may report no tokens itself
            num_tokens = max(num_tokens, _num_written(call, sample.index))
        return Answer(
            layer=self.layer,
            index=slot.index,
            text=sample.text,
            finish_reason=sample.finish_reason,
            num_prompt_tokens=sample.num_prompt_tokens,
            num_tokens=num_tokens,
            num_cached_tokens=sample.num_cached_tokens,
            seed=sample.seed,
            logprobs=sample.logprobs,
            prompt_logprobs=sample.prompt_logprobs,
            reasoning=sample.reasoning,
            num_reasoning_tokens=sample.num_reasoning_tokens,
            tool_calls=sample.tool_calls,
            error=sample.error if self.accepts_empty or sample.text.strip() else sample.error or EMPTY_ANSWER,
            inputs=slot.inputs,
            length_action=slot.length_action,
        )

    def _answer_lost(self, call: EngineCall, number: int, num_prompt_tokens: int, error: EngineError) -> Answer:
        slot = call.slots[number]
        return Answer(
            layer=self.layer,
            index=slot.index,
            text="",
            finish_reason="error",
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=_num_written(call, number),
            error=str(error),
            inputs=slot.inputs,
            length_action=slot.length_action,
        )


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Return about how many tokens a conversation has: one for four bytes of text, and four around each turn."""
    return sum(4 + len(all_text(message).encode()) // 4 for message in messages)


def _prompt_of(call: EngineCall) -> str:
    """Return the name of a call's prompt, which a second request for the same answers shares."""
    return call.request.request_id.removesuffix(HEDGE)


def _num_written(call: EngineCall, number: int) -> int:
    """Return the tokens that the engine has counted of a sample."""
    return call.request.written[number] if call.request.written is not None else 0


async def run_layer(
    calls: Sequence[EngineCall],
    tally: LayerTally,
    quorum: int,
    draft_deadline_s: float | None,
    on_piece: Callable[[TokenDelta | Answer], None],
    hedge_s: float | None = None,
) -> None:
    """Run the calls of a layer and fill the tally.

    `on_piece` is called with each piece of text as it is written (its `index` is the slot) and with each answer as it
    ends.
    """
    writers: list[Writer[Any]] = [partial(_answer_call, call) for call in calls]
    if draft_deadline_s is not None:
        writers.append(partial(_emit_deadline, draft_deadline_s))
    if hedge_s is not None:
        writers += [partial(_hedge, call, tally, hedge_s) for call in calls]
    is_late = False
    # the events of a single call need neither a task nor a queue
    async with aclosing(_events_of(calls[0]) if len(writers) == 1 else fan_in(writers)) as items:
        async for item in items:
            if isinstance(item, _DraftDeadline):
                is_late = True
            else:
                call, event = item
                if isinstance(event, TokenDelta):
                    on_piece(dataclasses.replace(event, index=call.slots[event.index].index))
                    continue
                for answer in tally.take(call, event):
                    on_piece(answer)
            if not tally.unfinished or (is_late and len(tally.usable) >= quorum):
                return


async def _events_of(call: EngineCall) -> AsyncGenerator[tuple[EngineCall, EngineEvent | EngineError], None]:
    """Yield the call's events, and last an EngineError for slots without an answer (normally there are none)."""
    try:
        async with aclosing(call.engine.generate(call.request)) as events:
            async for event in events:
                yield call, event
    except EngineError as error:
        yield call, error
    else:
        yield call, EngineError("the engine ended the request without answering")


async def _answer_call(call: EngineCall, emit: Emit[tuple[EngineCall, EngineEvent | EngineError]]) -> None:
    """Emit the call's events."""
    async with aclosing(_events_of(call)) as items:
        async for item in items:
            emit(item)


async def _hedge(
    call: EngineCall, tally: LayerTally, seconds: float, emit: Emit[tuple[EngineCall, EngineEvent | EngineError]]
) -> None:
    """After `seconds`, request the unfinished answers again with the same seeds: another replica may be faster."""
    await asyncio.sleep(seconds)
    left = [number for number, slot in enumerate(call.slots) if slot.index in tally.unfinished]
    if not left:
        return
    request = dataclasses.replace(
        call.request,
        request_id=f"{call.request.request_id}{HEDGE}",
        seeds=tuple(call.request.seeds[number] for number in left),
        written=Counter(),
    )
    again = EngineCall(engine=call.engine, request=request, slots=tuple(call.slots[number] for number in left))
    tally.begin(again)
    await _answer_call(again, emit)


@dataclass(frozen=True)
class _DraftDeadline:
    """The draft deadline has passed."""


async def _emit_deadline(seconds: float, emit: Emit[_DraftDeadline]) -> None:
    await asyncio.sleep(seconds)
    emit(_DraftDeadline())
