"""Propose-and-aggregate (arXiv 2501.11877), written once as an async generator of events over an `Engine`.

    layer 0          K proposals from the conversation                       proposer
    layers 1 .. L-1  K aggregations, each of (M of) the K answers below      aggregator
    layer L          one aggregation, streamed: the final answer             aggregator

Each run is its own coroutine: its layer l+1 starts when *its* layer l is over, whatever other runs are doing, so an
engine that serves many runs always has a full batch. `all_layers` is the loop; `calls.py` makes the engine requests of
a layer, `layer.py` runs and counts them, and `agreement.py` decides what needs no model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from aft_ray.engines.base import TokenDelta
from aft_ray.errors import DeadlineExceeded, EngineError, QuorumNotMet
from aft_ray.fan_in import Emit, fan_in
from aft_ray.inference.agreement import all_agree, break_tie, leading
from aft_ray.inference.calls import layer_calls
from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.inference.layer import EngineCall, LayerTally, run_layer
from aft_ray.inference.off_loop import num_characters, off_loop
from aft_ray.inference.plan import ONE_ANSWER, FinalLayer, Plan
from aft_ray.inference.role import Role
from aft_ray.inference.run import Run
from aft_ray.records import Message
from aft_ray.templates import AggregatorTemplate


async def propose_and_aggregate(
    *,
    prompt_id: str,
    messages: Sequence[Message],
    plan: Plan,
    proposer: Role | Sequence[Role],
    aggregator: Role,
    template: AggregatorTemplate,
    run_seed: int = 0,
    request_id: str | None = None,
    on_usage: Callable[[LayerUsage], None] | None = None,
    final: FinalLayer = ONE_ANSWER,
    cache_salt: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> AsyncGenerator[Event, None]:
    """Answer one prompt by the plan and yield each event as it happens; the last one is `Finished`.

    `run_seed` and `prompt_id` fix every sample and every draw. `request_id` names the engine requests; two runs must
    not use the same one at the same time, and None makes one up. Closing the generator, or cancelling its consumer,
    aborts every engine request at once. `on_usage` is called with the usage of each layer when the layer is over, even
    if it failed, ran into a deadline or was cancelled: once the generator is closed, every token has been reported.
    `final` asks for more than one plain answer of the last layer; a plan that may decide without a model (`vote`,
    `early_stop`) gives one answer only. `template_arguments` reach the chat templates in every layer.

    Raises QuorumNotMet (too few usable answers in a layer below the last), EngineError (no final answer),
    DeadlineExceeded, PromptTooLong. A layer below the last that is cut short still yields its `LayerDone` first.
    """
    run = Run(
        prompt_id=prompt_id,
        messages=tuple(messages),
        plan=plan,
        proposers=(proposer,) if isinstance(proposer, Role) else tuple(proposer),
        aggregator=aggregator,
        template=template,
        run_seed=run_seed,
        request_id=request_id or f"{prompt_id}-{uuid.uuid4().hex[:12]}",
        on_usage=on_usage,
        final=final,
        cache_salt=cache_salt,
        template_arguments=template_arguments or {},
    )
    async with aclosing(fan_in([partial(within_deadline, run)])) as events:
        async for event in events:
            yield event


async def run_to_end(events: AsyncGenerator[Event, None]) -> Finished:
    """Return the last event of `propose_and_aggregate`, for callers that need only the result."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise AssertionError("a run ended without an answer and without an error")


@dataclass(frozen=True)
class Layer:
    """The result of a layer that is over."""

    answers: tuple[Answer, ...]
    """The usable answers, in the order of their slots."""
    usage: LayerUsage


async def within_deadline(run: Run, emit: Emit[Event]) -> None:
    """Run all layers, or raise DeadlineExceeded when `plan.deadline_s` passes first."""
    done: list[Layer] = []
    clock = asyncio.timeout(run.plan.deadline_s)
    try:
        async with clock:
            await all_layers(run, done, emit)
    except TimeoutError:
        if not clock.expired():
            raise  # the timeout is the engine's, not ours
        raise DeadlineExceeded(
            f"prompt {run.prompt_id}: deadline_s {run.plan.deadline_s} passed in layer {len(done)} of "
            f"{run.plan.num_layers}. Raise deadline_s, or lower num_proposals, num_layers or max_tokens"
        ) from None


async def all_layers(run: Run, done: list[Layer], emit: Emit[Event]) -> None:
    """The method: K proposals, L-1 times K aggregations of the layer below, and the final answer (L=0: only that)."""
    plan = run.plan
    below: tuple[Answer, ...] = ()
    for layer in range(plan.num_layers):
        calls = await calls_of(run, layer, below, plan.num_proposals)
        done.append(await draft(run, layer, calls, emit))
        below = done[-1].answers
        if all_agree(below, plan.early_stop):
            usage = LayerUsage(layer=plan.num_layers, num_answers=1, decided_by="agreement")
            decide(run, done, below, usage, emit)
            return
    if plan.num_layers and plan.aggregator == "vote":
        await vote(run, done, below, emit)
        return
    calls = await calls_of(run, plan.num_layers, below, run.final.num_choices)
    done.append(await finish(run, calls, emit))
    emit_finished(run, done, calls[0].request.messages, emit)


async def calls_of(run: Run, layer: int, below: Sequence[Answer], num_slots: int) -> list[EngineCall]:
    """Run `layer_calls`, in a thread where there is much to tokenize."""
    size = num_characters(run.messages) + sum(len(answer.text) for answer in below)
    return await off_loop(size, layer_calls, run, layer, below, num_slots)


def emit_finished(run: Run, done: Sequence[Layer], messages: Sequence[Message], emit: Emit[Event]) -> None:
    """Emit the last event: the final answer and everything that led to it."""
    emit(
        Finished(
            answer=done[-1].answers[0],
            layers=tuple(layer.answers for layer in done),
            usage=tuple(layer.usage for layer in done),
            messages=tuple(messages),
        )
    )


async def draft(run: Run, layer: int, calls: Sequence[EngineCall], emit: Emit[Event]) -> Layer:
    """Write a layer below the last: K answers concurrently, of which a quorum must be usable."""
    tally, plan = LayerTally(layer, calls), run.plan

    def on_piece(piece: TokenDelta | Answer) -> None:
        if isinstance(piece, Answer):
            emit(ProposalDone(answer=piece))

    try:
        await run_layer(calls, tally, plan.quorum_needed, plan.draft_deadline_s, on_piece, plan.hedge_s)
    finally:  # report the cost, even when the run's deadline cuts the layer short
        usage = tally.usage()
        run.report_usage(usage)
        emit(LayerDone(usage=usage))
    if len(tally.usable) < plan.quorum_needed:
        raise QuorumNotMet(
            f"prompt {run.prompt_id}, layer {layer}: {len(tally.usable)} of {plan.num_proposals} answers usable, "
            f"{plan.quorum_needed} needed, {len(tally.failed)} failed or empty; the first: {tally.failed[0].error}"
        )
    return Layer(tally.answers, usage)


async def finish(run: Run, calls: Sequence[EngineCall], emit: Emit[Event]) -> Layer:
    """Write the last layer and emit it as it is written: normally one answer; of several, all must be usable."""
    layer, num_choices = run.plan.num_layers, run.final.num_choices
    tally = LayerTally(layer, calls, accepts_empty=True)

    def on_piece(piece: TokenDelta | Answer) -> None:
        if isinstance(piece, TokenDelta):
            emit(
                AnswerDelta(
                    text=piece.text,
                    num_tokens=piece.num_tokens,
                    index=piece.index,
                    logprobs=piece.logprobs,
                    reasoning=piece.reasoning,
                    tool_calls=piece.tool_calls,
                )
            )

    try:
        await run_layer(calls, tally, num_choices, draft_deadline_s=None, on_piece=on_piece)
    finally:
        usage = tally.usage()
        run.report_usage(usage)
    if len(tally.usable) < num_choices:
        raise EngineError(f"prompt {run.prompt_id}, layer {layer} (the last): {tally.failed[0].error}")
    return Layer(tally.answers, usage)


async def vote(run: Run, done: list[Layer], below: Sequence[Answer], emit: Emit[Event]) -> None:
    """Decide the last layer by counting the answers below; the likelier ones win a tie."""
    started = time.monotonic()
    first, *tied = leading(below)
    voters, num_tokens = await break_tie(run, [first, *tied]) if tied else (first, 0)
    usage = LayerUsage(
        layer=run.plan.num_layers,
        prompt_tokens=num_tokens,
        num_answers=1,
        seconds=time.monotonic() - started,
        decided_by="vote",
    )
    run.report_usage(usage)
    decide(run, done, voters, usage, emit)


def decide(run: Run, done: list[Layer], voters: Sequence[Answer], usage: LayerUsage, emit: Emit[Event]) -> None:
    """Take the first voter's answer as the final answer, without asking a model."""
    answer = dataclasses.replace(
        voters[0],
        layer=run.plan.num_layers,
        index=0,
        num_prompt_tokens=0,
        num_cached_tokens=0,
        inputs=tuple(sorted(voter.index for voter in voters)),
        length_action=None,
    )
    for layer in range(len(done), run.plan.num_layers):
        done.append(Layer((), LayerUsage(layer=layer, decided_by="agreement")))
    done.append(Layer((answer,), usage))
    emit(AnswerDelta(text=answer.text, num_tokens=0))
    emit_finished(run, done, run.messages, emit)
