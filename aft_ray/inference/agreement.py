"""Final answers that need no aggregation: early stop where all drafts agree, and majority vote.

Four drafts say 12, "The answer is 12.", 12 and 13: they do not agree, and 12 wins the vote. The final answer is then
the first of the three texts that say 12.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from aft_ray.errors import EngineError, PromptTooLong
from aft_ray.inference.answers import normalised, short_answer
from aft_ray.inference.events import Answer
from aft_ray.inference.run import Run
from aft_ray.templates import fit_prompt


def all_agree(answers: Sequence[Answer], kind: Literal["exact", "answer"] | None) -> bool:
    """Whether there are two or more answers and all are equal, as `Plan.early_stop` compares them."""
    if kind is None or len(answers) < 2:
        return False
    keys = {answer.text.strip() if kind == "exact" else short_answer(answer.text) for answer in answers}
    return len(keys) == 1 and None not in keys


def leading(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Return the largest groups of equal answers (several in a tie), in the order of their first members.

    Where some answers have a short answer, only those are counted; where none has, whole texts are compared.
    """
    readable = [answer for answer in answers if short_answer(answer.text)]
    groups: dict[str, list[Answer]] = {}
    for answer in readable or answers:
        groups.setdefault(short_answer(answer.text) or normalised(answer.text), []).append(answer)
    most = max(len(group) for group in groups.values())
    return [group for group in groups.values() if len(group) == most]


async def break_tie(run: Run, tied: Sequence[Sequence[Answer]]) -> tuple[list[Answer], int]:
    """Return the group whose answers the aggregator finds likeliest on average, and the number of tokens it scored.

    The group's likeliest answer comes first. An answer's score is its mean log-probability per token after the
    conversation. Where the engine cannot score (it takes messages, or an answer does not fit the window), the first
    group wins.
    """
    role = run.aggregator
    if role.engine.info.takes_messages:
        return list(tied[0]), 0
    answers = [answer for group in tied for answer in group]
    prompt_format = run.format_of(run.plan.num_layers, role)
    targets = [prompt_format.target_ids(run.messages, answer.text) for answer in answers]
    longest = max(len(target) for target in targets)
    try:
        prompt = fit_prompt(prompt_format, run.messages, role.engine.info.max_model_len - longest - 1)
        logprobs = await asyncio.gather(*(role.engine.score(prompt, target, role.adapter) for target in targets))
    except (EngineError, PromptTooLong):
        return list(tied[0]), 0
    score = {answer.index: sum(lp) / max(1, len(lp)) for answer, lp in zip(answers, logprobs, strict=True)}
    best = max(tied, key=lambda group: sum(score[answer.index] for answer in group) / len(group))
    num_tokens = sum(len(prompt) + len(target) for target in targets)
    return sorted(best, key=lambda answer: -score[answer.index]), num_tokens
