"""Propose-and-aggregate (arXiv 2501.11877), written once as an async generator of events over an `Engine`.

    layer 0          K proposals from the conversation                       proposer
    layers 1 .. L-1  K aggregations, each of (M of) the K answers below      aggregator
    layer L          one aggregation, streamed: the final answer             aggregator

Each run is its own coroutine: its layer l+1 starts when *its* layer l is over, whatever other runs do beside it, so an
engine that serves many of them always has a full batch. `all_layers` is the loop; what a layer asks is in `calls.py`,
how it is run and counted in `layer.py`, what needs no asking in `agreement.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from aft_ray.engines.base import TokenDelta
from aft_ray.errors import DeadlineExceeded, EngineError, QuorumNotMet
from aft_ray.inference.agreement import all_agree, break_tie, leading
from aft_ray.inference.calls import Call, Run, layer_calls, num_characters, off_loop
from aft_ray.inference.events import Answer, AnswerDelta, Event, Finished, LayerDone, LayerUsage, ProposalDone
from aft_ray.inference.fan_in import Tell, fan_in
from aft_ray.inference.layer import Ledger, run_layer
from aft_ray.inference.plan import ONE_ANSWER, FinalLayer, Plan
from aft_ray.inference.role import Role
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
    account: Callable[[LayerUsage], None] | None = None,
    final: FinalLayer = ONE_ANSWER,
) -> AsyncGenerator[Event, None]:
    """Answer one prompt by the plan, telling each event as it happens; the last one is `Finished`.

    `run_seed` and `prompt_id` fix every sample and every draw. `request_id` names the engine requests and must not be
    in use twice at a time; None makes one up. Closing the generator, or cancelling its consumer, aborts every request
    at once. `account` is told what each layer cost when it is over, also one that failed, was cut by a deadline or was
    cancelled: by the time the generator is closed, every token has been told. `final` asks for more of the last layer
    than one answer; a plan that may settle it without writing (`vote`, `early_stop`) gives one answer and no more.

    Raises QuorumNotMet (too few usable answers in a layer below the last), EngineError (no final answer),
    DeadlineExceeded, PromptTooLong. A layer below the last that is cut short still tells its `LayerDone` first.
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
        account=account,
        final=final,
    )
    async with aclosing(fan_in([partial(within_deadline, run)])) as events:
        async for event in events:
            yield event


async def run_to_end(
    *,
    prompt_id: str,
    messages: Sequence[Message],
    plan: Plan,
    proposer: Role | Sequence[Role],
    aggregator: Role,
    template: AggregatorTemplate,
    run_seed: int = 0,
    request_id: str | None = None,
) -> Finished:
    """The last event of `propose_and_aggregate`, for callers that need only the outcome."""
    events = propose_and_aggregate(
        prompt_id=prompt_id,
        messages=messages,
        plan=plan,
        proposer=proposer,
        aggregator=aggregator,
        template=template,
        run_seed=run_seed,
        request_id=request_id,
    )
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise AssertionError(f"run {prompt_id} ended without an answer and without an error")


@dataclass(frozen=True)
class Layer:
    """A layer that is over."""

    answers: tuple[Answer, ...]
    """The usable ones, by index."""
    usage: LayerUsage


async def within_deadline(run: Run, tell: Tell[Event]) -> None:
    """All layers, or DeadlineExceeded when `plan.deadline_s` passes first."""
    done: list[Layer] = []
    clock = asyncio.timeout(run.plan.deadline_s)
    try:
        async with clock:
            await all_layers(run, done, tell)
    except TimeoutError:
        if not clock.expired():
            raise  # an engine's own
        raise DeadlineExceeded(
            f"prompt {run.prompt_id}: deadline_s {run.plan.deadline_s} passed in layer {len(done)} of "
            f"{run.plan.num_layers}. Raise deadline_s, or lower num_proposals, num_layers or max_tokens"
        ) from None


async def all_layers(run: Run, done: list[Layer], tell: Tell[Event]) -> None:
    """The method: K proposals, L-1 times K aggregations of what is below, one final answer. L=0: that answer alone."""
    plan = run.plan
    below: tuple[Answer, ...] = ()
    for layer in range(plan.num_layers):
        calls = await calls_of(run, layer, below, plan.num_proposals)
        done.append(await draft(run, layer, calls, tell))
        below = done[-1].answers
        if all_agree(below, plan.early_stop):
            settled = LayerUsage(layer=plan.num_layers, num_answers=1, decided_by="agreement")
            settle(run, done, below, settled, tell)
            return
    if plan.num_layers and plan.aggregator == "vote":
        await vote(run, done, below, tell)
        return
    calls = await calls_of(run, plan.num_layers, below, run.final.num_answers)
    done.append(await finish(run, calls, tell))
    tell_finished(run, done, calls[0].request.messages, tell)


async def calls_of(run: Run, layer: int, below: Sequence[Answer], num_slots: int) -> list[Call]:
    """`layer_calls`, off the event loop where there is much to tokenize."""
    size = num_characters(run.messages) + sum(len(answer.text) for answer in below)
    return await off_loop(size, layer_calls, run, layer, below, num_slots)


def tell_finished(run: Run, done: Sequence[Layer], messages: Sequence[Message], tell: Tell[Event]) -> None:
    """The last event: the final answer and all that led to it."""
    tell(
        Finished(
            answer=done[-1].answers[0],
            layers=tuple(layer.answers for layer in done),
            usage=tuple(layer.usage for layer in done),
            messages=tuple(messages),
        )
    )


async def draft(run: Run, layer: int, calls: Sequence[Call], tell: Tell[Event]) -> Layer:
    """A layer below the last: K answers side by side, of which a quorum must be usable."""
    ledger, plan = Ledger(layer, calls), run.plan

    def watch(piece: TokenDelta | Answer) -> None:
        if isinstance(piece, Answer):
            tell(ProposalDone(answer=piece))

    try:
        await run_layer(calls, ledger, plan.quorum_needed, plan.draft_deadline_s, watch, plan.hedge_s)
    finally:  # also when the run's deadline cuts the layer short: what it cost is told
        usage = ledger.usage()
        run.tell_cost(usage)
        tell(LayerDone(usage=usage))
    if len(ledger.usable) < plan.quorum_needed:
        raise QuorumNotMet(
            f"prompt {run.prompt_id}, layer {layer}: {len(ledger.usable)} of {plan.num_proposals} answers usable, "
            f"{plan.quorum_needed} needed, {len(ledger.failed)} failed or empty; the first: {ledger.failed[0].error}"
        )
    return Layer(ledger.answers, usage)


async def finish(run: Run, calls: Sequence[Call], tell: Tell[Event]) -> Layer:
    """The last layer: the final answers, told as they are made. One as a rule; of several, all must be usable."""
    layer, num_answers = run.plan.num_layers, run.final.num_answers
    ledger = Ledger(layer, calls)

    def watch(piece: TokenDelta | Answer) -> None:
        if isinstance(piece, TokenDelta):
            tell(AnswerDelta(text=piece.text, num_tokens=piece.num_tokens, index=piece.index, logprobs=piece.logprobs))

    try:
        await run_layer(calls, ledger, num_answers, draft_deadline_s=None, watch=watch)
    finally:
        usage = ledger.usage()
        run.tell_cost(usage)
    if len(ledger.usable) < num_answers:
        raise EngineError(f"prompt {run.prompt_id}, layer {layer} (the last): {ledger.failed[0].error}")
    return Layer(ledger.answers, usage)


async def vote(run: Run, done: list[Layer], below: Sequence[Answer], tell: Tell[Event]) -> None:
    """The last layer by counting: most of the answers below, a tie to the likelier ones."""
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
    run.tell_cost(usage)
    settle(run, done, voters, usage, tell)


def settle(run: Run, done: list[Layer], voters: Sequence[Answer], usage: LayerUsage, tell: Tell[Event]) -> None:
    """The answer of the first voter is the final one."""
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
    tell(AnswerDelta(text=answer.text, num_tokens=0))
    tell_finished(run, done, run.messages, tell)
