"""The length budget: every policy, at its edges, with and without a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import get_args

import pytest
from families import format_of, user

from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.templates import (
    AggregatorTemplate,
    Fitted,
    LengthPolicy,
    MessagesFormat,
    PromptFormat,
    fit_aggregation,
    fit_prompt,
)

TEMPLATE = AggregatorTemplate(name="short", system="{proposals}", slot="[{index}]\n{proposal}\n[/{index}]")
CONVERSATION = [user("Hello there")]
FORMATS: list[PromptFormat] = [format_of("chatml"), MessagesFormat()]
POLICIES: tuple[LengthPolicy, ...] = get_args(LengthPolicy)


def words(number: int) -> str:
    """Return a text with this many tokens in every test tokenizer: `Hello there there ...`."""
    return "Hello" + " there" * (number - 1)


def length(format: PromptFormat, proposals: Sequence[str]) -> int:
    return format.count(TEMPLATE.messages(CONVERSATION, proposals))


def fit(format: PromptFormat, proposals: Sequence[str], allowed: int, policy: LengthPolicy) -> Fitted:
    return fit_aggregation(format, TEMPLATE, CONVERSATION, proposals, allowed, policy)


@pytest.fixture(params=FORMATS, ids=["ids", "messages"])
def any_format(request: pytest.FixtureRequest) -> PromptFormat:
    return request.param


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "proposals", [[words(9)], [""], ["", ""], [words(3)] * 3], ids=["one", "empty", "two empty", "same"]
)
def test_what_fits_exactly_is_not_touched(any_format: PromptFormat, proposals: list[str], policy: LengthPolicy) -> None:
    fitted = fit(any_format, proposals, length(any_format, proposals), policy)
    assert fitted.messages == TEMPLATE.messages(CONVERSATION, proposals)
    assert fitted.prompt_ids == any_format.prompt_ids(fitted.messages)
    assert fitted.kept == tuple(range(len(proposals)))
    assert fitted.action is None


def test_drop_longest_drops_the_longest_until_the_rest_fits(any_format: PromptFormat) -> None:
    proposals = [words(4), words(20), words(2), words(10), ""]
    allowed = length(any_format, [words(4), words(2), words(10), ""])
    fitted = fit(any_format, proposals, allowed, "drop_longest")
    assert (fitted.kept, fitted.action) == ((0, 2, 3, 4), "drop_longest: dropped 1 of 5")
    fitted = fit(any_format, proposals, allowed - 1, "drop_longest")
    assert (fitted.kept, fitted.action) == ((0, 2, 4), "drop_longest: dropped 2 of 5")
    assert fitted.messages == TEMPLATE.messages(CONVERSATION, [words(4), words(2), ""])


def test_drop_longest_drops_the_last_of_equally_long_ones(any_format: PromptFormat) -> None:
    proposals = [words(8), words(3), words(8), words(8)]
    fitted = fit(any_format, proposals, length(any_format, proposals) - 1, "drop_longest")
    assert fitted.kept == (0, 1, 2)


def test_fewer_drops_the_last_until_the_rest_fits(any_format: PromptFormat) -> None:
    proposals = [words(20), words(2), words(2), words(2)]
    fitted = fit(any_format, proposals, length(any_format, proposals[:2]), "fewer")
    assert (fitted.kept, fitted.action) == ((0, 1), "fewer: dropped 2 of 4")
    fitted = fit(any_format, proposals, length(any_format, proposals[:1]), "fewer")
    assert (fitted.kept, fitted.action) == ((0,), "fewer: dropped 3 of 4")


def test_truncate_each_cuts_all_to_the_largest_equal_allowance_that_fits() -> None:
    format = format_of("chatml")
    proposals = [words(30), words(4), "", words(50)]

    def cut_to(allowance: int) -> list[str]:
        return [words(allowance) + "…", words(4), "", words(allowance) + "…"]

    fitted = fit(format, proposals, length(format, cut_to(11)), "truncate_each")
    assert fitted.messages == TEMPLATE.messages(CONVERSATION, cut_to(11))
    assert (fitted.kept, fitted.action) == ((0, 1, 2, 3), "truncate_each: cut 2 of 4 to 11 tokens")
    fitted = fit(format, proposals, length(format, cut_to(11)) - 1, "truncate_each")
    assert fitted.messages == TEMPLATE.messages(CONVERSATION, cut_to(10))


def test_truncate_each_leaves_at_least_one_token_of_each_or_refuses() -> None:
    format = format_of("chatml")
    proposals = [words(30), words(30)]
    least = length(format, ["Hello…", "Hello…"])
    assert fit(format, proposals, least, "truncate_each").action == "truncate_each: cut 2 of 2 to 1 tokens"
    with pytest.raises(
        PromptTooLong, match=rf"with 2 proposals has {least} tokens, {least - 1} are allowed.*drop_longest"
    ):
        fit(format, proposals, least - 1, "truncate_each")


def test_truncate_each_fits_where_the_length_is_only_estimated() -> None:
    format, proposals = MessagesFormat(), [words(40), words(3), words(80)]
    allowed = length(format, proposals) // 2
    fitted = fit(format, proposals, allowed, "truncate_each")
    assert format.count(fitted.messages) <= allowed
    assert words(3) in fitted.messages[0]["content"]
    assert fitted.messages[0]["content"].count("…") == 2


def test_error_says_how_much_too_long_the_prompt_is() -> None:
    format, proposals = format_of("chatml"), [words(9), words(9)]
    found = length(format, proposals)
    with pytest.raises(PromptTooLong, match=f"2 proposals has {found} tokens, {found - 1} are allowed"):
        fit(format, proposals, found - 1, "error")


@pytest.mark.parametrize("policy", ["drop_longest", "fewer"])
def test_the_last_proposal_is_never_dropped(any_format: PromptFormat, policy: LengthPolicy) -> None:
    proposals = [words(9), words(12)]
    least = length(any_format, [words(9)])
    assert fit(any_format, proposals, least, policy).kept == (0,)
    with pytest.raises(PromptTooLong, match=f"one proposal has {least} tokens, {least - 1} are allowed.*truncate_each"):
        fit(any_format, proposals, least - 1, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "proposals", [[""], [words(5)], ["", ""], [words(5)] * 4], ids=["empty", "one", "two empty", "same"]
)
def test_a_window_that_the_conversation_alone_fills_is_refused_by_every_policy(
    any_format: PromptFormat, proposals: list[str], policy: LengthPolicy
) -> None:
    for allowed in (1, 0, -7):
        with pytest.raises(PromptTooLong, match=f"{allowed} are allowed.*raise max_model_len"):
            fit(any_format, proposals, allowed, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_fits_is_within_the_window_and_whatever_does_not_is_refused(policy: LengthPolicy) -> None:
    rng, format, num_refused = random.Random(3), format_of("gemma"), 0
    pieces = ["Hello", " there", "<eos>", "[1]", "[/2]", "é😀", "\n\n", "…", " ", "{proposal}"]
    for _ in range(60):
        proposals = ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(rng.randint(1, 5))]
        allowed = rng.randint(10, 150)
        try:
            fitted = fit(format, proposals, allowed, policy)
        except PromptTooLong:
            num_refused += 1
            continue
        assert format.prompt_ids(fitted.messages) == fitted.prompt_ids
        assert len(fitted.prompt_ids) <= allowed
        assert list(fitted.kept) == sorted(set(fitted.kept)) and fitted.kept
        assert (fitted.action is None) == (length(format, proposals) <= allowed)
    assert 0 < num_refused < 60


def test_an_unknown_policy_and_missing_proposals_are_refused(any_format: PromptFormat) -> None:
    with pytest.raises(ConfigError, match="length_policy 'shorter' is not known; expected one of drop_longest"):
        fit(any_format, ["a"], 100, "shorter")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one proposal"):
        fit(any_format, [], 100, "fewer")


def test_the_policies_are_those_of_the_plan() -> None:
    for policy in POLICIES:
        assert fit(MessagesFormat(), ["a"], 1000, policy).kept == (0,)


def test_a_plain_prompt_fits_or_is_refused(any_format: PromptFormat) -> None:
    found = any_format.count(CONVERSATION)
    assert fit_prompt(any_format, CONVERSATION, found) == any_format.prompt_ids(CONVERSATION)
    with pytest.raises(PromptTooLong, match=f"conversation has {found} tokens, {found - 1} are allowed.*max_model_len"):
        fit_prompt(any_format, CONVERSATION, found - 1)
