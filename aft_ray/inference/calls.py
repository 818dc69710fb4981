"""The engine requests of each layer: which answers a slot is shown, the prompt, the seeds. Pure functions of the run.

    layer 0        one request with K seeds, so the engine computes the prompt once for all proposals; where several
                   models propose, one request for each, with its share of the K slots
    layer l >= 1   each slot is shown answers of layer l-1; slots with equal prompts share one request

With M = K (AFT) all slots of a layer are shown the same answers, so the layer is one request with K seeds, which Serve
sends to one replica: spreading it over two was never faster under load (RESULTS.md). With M < K (recursive
self-aggregation, arXiv 2509.26626) each slot draws its own M answers. Every draw and every seed is derived from (run
seed, prompt_id, layer, slot), so a run can be repeated exactly, whatever else runs at the same time.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aft_ray.engines.base import GenerateRequest
from aft_ray.errors import ConfigError, InputError
from aft_ray.inference.events import Answer
from aft_ray.inference.layer import EngineCall, Slot
from aft_ray.inference.role import Role
from aft_ray.inference.run import Run
from aft_ray.inference.shares import apportion
from aft_ray.records import Message, derive_seed
from aft_ray.templates import fit_aggregation, fit_prompt
from aft_ray.templates.budget import fit_text


@dataclass(frozen=True)
class _Prompt:
    """A prompt for one role's model, and the slots that it fills."""

    role: Role
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    slots: tuple[Slot, ...]


def layer_calls(run: Run, layer: int, below: Sequence[Answer], num_slots: int) -> list[EngineCall]:
    """Return the requests that fill a layer's `num_slots` slots. `below`: the usable answers of the layer below."""
    prompts = _proposal_prompts(run, num_slots) if layer == 0 else _aggregation_prompts(run, layer, below, num_slots)
    return [_engine_call(run, layer, number, prompt) for number, prompt in enumerate(prompts)]


def draw_shown(run: Run, layer: int, below: Sequence[Answer], num_slots: int) -> list[tuple[Answer, ...]]:
    """Return, for each slot of a layer, the answers of the layer below that it is shown, in the order shown.

    `drop_duplicates` applies before the draw, so a slot is shown M different texts where there are that many.
    """
    plan = run.plan
    candidates = distinct(below) if plan.drop_duplicates else tuple(below)
    size = min(plan.subset_size or plan.num_proposals, len(candidates))
    if plan.subset_size in (None, plan.num_proposals):
        return [_draw(run, layer, 0, candidates, size)] * num_slots
    return [_draw(run, layer, slot, candidates, size) for slot in range(num_slots)]


def distinct(answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """Return the answers whose text, stripped, is not that of an earlier answer."""
    by_text: dict[str, Answer] = {}
    for answer in answers:
        by_text.setdefault(answer.text.strip(), answer)
    return tuple(by_text.values())


def _draw(run: Run, layer: int, slot: int, candidates: Sequence[Answer], size: int) -> tuple[Answer, ...]:
    rng = random.Random(derive_seed(run.run_seed, f"{run.prompt_id}/shown", layer, slot))
    positions = rng.sample(range(len(candidates)), size)
    return tuple(candidates[p] for p in (positions if run.plan.shuffle else sorted(positions)))


def _proposal_prompts(run: Run, num_slots: int) -> list[_Prompt]:
    roles = run.proposers if run.plan.num_layers else [max(run.proposers, key=lambda role: role.share)]
    counts = apportion(num_slots, [role.share for role in roles])  # a small share may get none
    ends = itertools.accumulate(counts)
    return [
        _proposal_prompt(run, role, range(end - count, end))
        for role, count, end in zip(roles, counts, ends, strict=True)
        if count
    ]


def _proposal_prompt(run: Run, role: Role, slots: range) -> _Prompt:
    if run.final.echo is not None:
        ids = fit_text(role.format, run.final.echo, run.max_prompt_tokens(0, role))
        return _Prompt(role, run.messages, ids, tuple(Slot(index=index) for index in slots))
    messages = run.conversation(0)
    ids = fit_prompt(run.format_of(0, role), messages, run.max_prompt_tokens(0, role))
    return _Prompt(role, messages, tuple(ids), tuple(Slot(index=index) for index in slots))


def _aggregation_prompts(run: Run, layer: int, below: Sequence[Answer], num_slots: int) -> list[_Prompt]:
    """Return one prompt per distinct list of shown texts, with all the slots that are shown these texts."""
    shown_by_texts: dict[tuple[str, ...], dict[int, tuple[Answer, ...]]] = {}
    for slot, shown in enumerate(draw_shown(run, layer, below, num_slots)):
        shown_by_texts.setdefault(tuple(_text_shown(run, answer) for answer in shown), {})[slot] = shown
    return [_aggregation_prompt(run, layer, texts, shown) for texts, shown in shown_by_texts.items()]


def _text_shown(run: Run, answer: Answer) -> str:
    """Return what an aggregator sees of an answer."""
    return f"{answer.reasoning}\n\n{answer.text}" if run.plan.show_thinking and answer.reasoning else answer.text


def _aggregation_prompt(
    run: Run, layer: int, texts: tuple[str, ...], shown: Mapping[int, tuple[Answer, ...]]
) -> _Prompt:
    fitted = fit_aggregation(
        run.format_of(layer, run.aggregator),
        run.template,
        run.conversation(layer),
        texts,
        run.max_prompt_tokens(layer, run.aggregator),
        run.plan.length_policy,
    )
    slots = tuple(
        Slot(index=slot, inputs=tuple(answers[k].index for k in fitted.kept), length_action=fitted.action)
        for slot, answers in shown.items()
    )
    return _Prompt(run.aggregator, tuple(fitted.messages), tuple(fitted.prompt_ids), slots)


def _engine_call(run: Run, layer: int, number: int, prompt: _Prompt) -> EngineCall:
    role, plan, tool_use = prompt.role, run.plan, run.final.tool_use
    if not prompt.prompt_ids and not role.engine.info.takes_messages:
        raise ConfigError(
            f"layer {layer}: engine {role.engine.info.model} takes token ids, but its prompt format makes none. "
            "Give the role a format with the model's tokenizer, such as ChatFormat"
        )
    if unknown := plan.sampling_of(layer).extras - role.engine.info.honours:
        raise InputError(f"layer {layer}: engine {role.engine.info.model} has no {', '.join(sorted(unknown))}")
    is_last = layer == plan.num_layers
    is_counted = not (plan.draft_deadline_s is plan.deadline_s is plan.hedge_s is run.on_usage is None)
    request = GenerateRequest(
        request_id=f"{run.request_id}/{layer}/{number}",
        prompt_ids=prompt.prompt_ids,
        messages=prompt.messages,
        sampling=run.sampling_of(layer, role, len(prompt.prompt_ids)),
        seeds=tuple(derive_seed(run.run_seed, run.prompt_id, layer, slot.index) for slot in prompt.slots),
        stop_ids=role.format.stop_ids,
        adapter=role.adapter,
        stream=is_last and run.final.is_read,
        top_logprobs=run.final.top_logprobs if is_last else None,
        prompt_logprobs=None if run.final.echo is None else run.final.top_logprobs,
        json_schema=run.final.json_schema if is_last else None,
        tool_use=tool_use if is_last and tool_use is not None and tool_use.may_call else None,
        template_arguments=run.template_arguments,
        cache_salt=run.cache_salt,
        written=Counter() if is_counted else None,
    )
    return EngineCall(engine=role.engine, request=request, slots=prompt.slots)
