"""One layer: its engine calls run concurrently, every answer and token is counted, stragglers may be cancelled.

An engine call is one `GenerateRequest`; its n samples fill n slots of the layer. The layer is over when every slot has
ended, or, after the draft deadline, when enough slots hold a usable answer. Closing the calls then aborts the rest.
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
from aft_ray.fan_in import Emit, Writer, fan_in
from aft_ray.inference.events import Answer, LayerUsage

EMPTY_ANSWER = "empty answer"
"""`Answer.error` of an answer without text, which an aggregator cannot use."""


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

    def __init__(self, layer: int, calls: Sequence[EngineCall]) -> None:
        self.layer = layer
        self.usable: dict[int, Answer] = {}
        self.failed: list[Answer] = []
        """Failed and empty answers, in the order they ended."""
        self.unfinished: dict[int, list[EngineCall]] = {}
        """The calls that may still fill a slot, by the slot's index."""
        self._num_tokens_seen: Counter[tuple[str, int]] = Counter()
        """Tokens that are part of no answer yet, by request and slot. Of a cancelled sample, nothing else is known."""
        self._sent: dict[tuple[str, int], bool] = {}
        """Whether the engine has reported an end, by request and slot. A prompt was sent for each of these pairs."""
        self._num_prompt_tokens: dict[str, int] = {}
        self._num_slots_written: Counter[str] = Counter()
        self._started = time.monotonic()
        for call in calls:
            self.begin(call)

    def begin(self, call: EngineCall) -> None:
        """Note that a call was sent for its slots."""
        self._num_prompt_tokens[call.request.request_id] = len(call.request.prompt_ids)
        for slot in call.slots:
            self.unfinished.setdefault(slot.index, []).append(call)
            self._sent[call.request.request_id, slot.index] = False

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The usable answers in the order of their slots, which does not depend on which ended first."""
        return tuple(self.usable[index] for index in sorted(self.usable))

    def take(self, call: EngineCall, event: EngineEvent | EngineError) -> list[Answer]:
        """Count one event of a call and return the answers that ended with it.

        An EngineError ends every slot that the call has left.
        """
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
        # a request that was refused at once cost nothing
        num_sent = self._num_prompt_tokens[call.request.request_id] if has_begun else 0
        return [answer for slot in left for answer in self._end(call, self._answer_lost(call, slot, num_sent, event))]

    def usage(self) -> LayerUsage:
        """Return tokens and seconds so far. Unfinished samples count as cancelled, with the tokens known of them."""
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

    def _end(self, call: EngineCall, answer: Answer) -> list[Answer]:
        """Fill a slot with an answer, unless it came too late or it failed and another call may still succeed."""
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
        # an answer that was lost with its replica and written again cost more than its own tokens
        self._num_tokens_seen[pair] = max(0, self._num_tokens_seen[pair] - answer.num_tokens)
        if answer.error is None:
            self.usable[answer.index] = answer
        else:
            self.failed.append(answer)
        return [answer]

    def _num_seen(self, call: EngineCall, slot: Slot, sample: Sample) -> int:
        """Return the tokens of a failed sample, which may report none itself."""
        return max(sample.num_tokens, self._num_tokens_seen[call.request.request_id, slot.index])

    def _answer_of(self, call: EngineCall, slot: Slot, sample: Sample) -> Answer:
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

    def _answer_lost(self, call: EngineCall, slot: Slot, num_prompt_tokens: int, error: EngineError) -> Answer:
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
    async with aclosing(fan_in(writers)) as items:
        async for item in items:
            if isinstance(item, _DraftDeadline):
                is_late = True
            else:
                call, event = item
                if isinstance(event, TokenDelta):
                    on_piece(dataclasses.replace(event, index=call.slots[event.index].index))
                for answer in tally.take(call, event):
                    on_piece(answer)
            if not tally.unfinished or (is_late and len(tally.usable) >= quorum):
                return


async def _answer_call(call: EngineCall, emit: Emit[tuple[EngineCall, EngineEvent | EngineError]]) -> None:
    """Emit the call's events, and last an EngineError for slots without an answer (normally there are none)."""
    try:
        async with aclosing(call.engine.generate(call.request)) as events:
            async for event in events:
                emit((call, event))
    except EngineError as error:
        emit((call, error))
    else:
        emit((call, EngineError("the engine ended the request without answering")))


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
        request_id=f"{call.request.request_id}/hedge",
        seeds=tuple(call.request.seeds[number] for number in left),
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
