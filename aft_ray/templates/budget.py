"""The length budget: prompt + proposals + answer must fit the window, and what was shortened is recorded.

    fitted = fit_aggregation(format, template, conversation, proposals, max_prompt_tokens=3584, policy="drop_longest")
    fitted.kept      (0, 2, 3, 4)
    fitted.action    "drop_longest: dropped 1 of 5"

`max_prompt_tokens` is the window minus the answer's `max_tokens`. Conversation and template are never cut, and at least
one proposal remains; when that does not fit, PromptTooLong says by how much and what to change. Data construction,
training and serving use the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.records import Message
from aft_ray.templates.aggregator import AggregatorTemplate
from aft_ray.templates.format import PromptFormat

LengthPolicy = Literal["drop_longest", "truncate_each", "fewer", "error"]
"""What is shortened when prompt + K proposals + answer do not fit the window:

`drop_longest`   drop the longest proposal, until the rest fits
`truncate_each`  cut every proposal to the same number of tokens, as many as fit
`fewer`          drop the last proposal, until the rest fits
`error`          raise PromptTooLong
"""

ELLIPSIS = "…"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """An aggregation prompt that fits."""

    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt; () for an engine that takes messages."""
    kept: tuple[int, ...]
    """Indices of the proposals that the prompt shows, in order."""
    action: str | None
    """What the policy did, as the row records it; None when everything fitted."""


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """The fixed part of one call: what is to be fitted, and into how many tokens."""

    format: PromptFormat
    template: AggregatorTemplate
    conversation: Sequence[Message]
    proposals: Sequence[str]
    max_prompt_tokens: int

    def measure(self, kept: Sequence[int], texts: Sequence[str] | None = None) -> tuple[Fitted, int]:
        """Return the prompt that shows the proposals `kept`, and its number of tokens. `texts`: proposals cut short."""
        source = self.proposals if texts is None else texts
        messages = self.template.messages(self.conversation, [source[index] for index in kept])
        ids = self.format.prompt_ids(messages)
        fitted = Fitted(messages=messages, prompt_ids=ids, kept=tuple(kept), action=None)
        return fitted, len(ids) or self.format.count(messages)


def fit_prompt(format: PromptFormat, messages: Sequence[Message], max_prompt_tokens: int) -> tuple[int, ...]:
    """Return the ids of a plain prompt. Raises PromptTooLong when they do not fit: a conversation is never cut."""
    ids = format.prompt_ids(messages)
    found = len(ids) or format.count(messages)
    if found > max_prompt_tokens:
        raise PromptTooLong(
            f"the conversation has {found} tokens, {max_prompt_tokens} are allowed (window minus answer): "
            "shorten it, raise max_model_len, or lower max_tokens of the answer"
        )
    return ids


def fit_text(format: PromptFormat, text: str | tuple[int, ...], max_prompt_tokens: int) -> tuple[int, ...]:
    """Return the ids of a text that no chat template shapes. Raises PromptTooLong when they do not fit."""
    ids = format.text_ids(text) if isinstance(text, str) else text
    if len(ids) > max_prompt_tokens:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens, {max_prompt_tokens} are allowed (window minus answer): shorten it, or "
            "lower max_tokens"
        )
    return ids


def fit_aggregation(
    format: PromptFormat,
    template: AggregatorTemplate,
    conversation: Sequence[Message],
    proposals: Sequence[str],
    max_prompt_tokens: int,
    policy: LengthPolicy,
) -> Fitted:
    """Return the aggregation prompt of `conversation` and `proposals`, shortened by `policy` where it does not fit."""
    if policy not in _POLICIES:
        raise ConfigError(f"length_policy '{policy}' is not known; expected one of {', '.join(_POLICIES)}")
    if not proposals:
        raise InputError("an aggregation needs at least one proposal, found none")
    budget = _Budget(
        format=format,
        template=template,
        conversation=conversation,
        proposals=proposals,
        max_prompt_tokens=max_prompt_tokens,
    )
    fitted, found = budget.measure(range(len(proposals)))
    return fitted if found <= max_prompt_tokens else _POLICIES[policy](budget, found)


def _error(budget: _Budget, found: int) -> Fitted:
    raise _too_long(budget, found, len(budget.proposals), "error", "choose another length_policy")


def _drop_longest(budget: _Budget, found: int) -> Fitted:
    """Drop the longest proposal first; of equally long ones, the last."""
    lengths = [budget.format.num_tokens(text) for text in budget.proposals]
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return _drop(budget, found, order, "drop_longest")


def _fewer(budget: _Budget, found: int) -> Fitted:
    return _drop(budget, found, range(len(budget.proposals)), "fewer")


def _drop(budget: _Budget, found: int, order: Sequence[int], policy: str) -> Fitted:
    """Drop proposals from the end of `order` until the rest fits. The order in the prompt does not change."""
    total = len(order)
    for num_kept in range(total - 1, 0, -1):
        fitted, found = budget.measure(sorted(order[:num_kept]))
        if found <= budget.max_prompt_tokens:
            return _with_action(fitted, f"{policy}: dropped {total - num_kept} of {total}")
    raise _too_long(budget, found, 1, policy, "use length_policy truncate_each")


def _truncate_each(budget: _Budget, found: int) -> Fitted:
    """Find the largest allowance per proposal that fits, by bisection. Each try is measured, never assumed to fit."""
    format, proposals = budget.format, budget.proposals
    lengths = [format.num_tokens(text) for text in proposals]
    best: Fitted | None = None
    low, high = 1, max(lengths) - 1
    found_at_least = found
    while low <= high:
        allowance = (low + high) // 2
        cut = [_cut(format, text, length, allowance) for text, length in zip(proposals, lengths, strict=True)]
        fitted, found = budget.measure(range(len(proposals)), cut)
        if found <= budget.max_prompt_tokens:
            num_cut = sum(length > allowance for length in lengths)
            action = f"truncate_each: cut {num_cut} of {len(proposals)} to {allowance} tokens"
            best, low = _with_action(fitted, action), allowance + 1
        else:
            found_at_least, high = min(found_at_least, found), allowance - 1
    if best is None:
        raise _too_long(budget, found_at_least, len(proposals), "truncate_each", "use length_policy drop_longest")
    return best


def _cut(format: PromptFormat, text: str, length: int, allowance: int) -> str:
    return text if length <= allowance else format.cut(text, allowance) + ELLIPSIS


def _with_action(fitted: Fitted, action: str) -> Fitted:
    return Fitted(messages=fitted.messages, prompt_ids=fitted.prompt_ids, kept=fitted.kept, action=action)


def _too_long(budget: _Budget, found: int, num_shown: int, policy: str, other: str) -> PromptTooLong:
    shown = "one proposal" if num_shown == 1 else f"{num_shown} proposals"
    return PromptTooLong(
        f"the aggregation prompt with {shown} has {found} tokens, {budget.max_prompt_tokens} are allowed (window minus "
        f"answer), and length_policy {policy} cannot shorten it further: {other}, lower max_tokens of "
        "proposals or answer, or raise max_model_len"
    )


_POLICIES: dict[str, Callable[[_Budget, int], Fitted]] = {
    "drop_longest": _drop_longest,
    "truncate_each": _truncate_each,
    "fewer": _fewer,
    "error": _error,
}
