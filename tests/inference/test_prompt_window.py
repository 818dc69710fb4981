"""The window: prompt + answer must fit, by the plan's length policy, and the answer records what it did.

The tokenizer here has one token per word, so every length can be counted by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
from scripted_runs import (
    MESSAGES,
    StallingEngine,
    drafts,
    finished,
    layers_done,
    role,
    run_plan,
    run_until_error,
    scripted,
)

from aft_ray.engines.base import Sampling
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import PromptTooLong
from aft_ray.inference import Plan, Role
from aft_ray.templates import AggregatorTemplate, ChatFormat, LengthPolicy

DRAFTS = tuple(" ".join([name] * length) for name, length in [("nile", 10), ("rhine", 40), ("oder", 20), ("elbe", 30)])
TEMPLATE = AggregatorTemplate.load("aft")
SHORT = Sampling(max_tokens=16)
WINDOW_IS_ENOUGH = 4096


@pytest.fixture(scope="module")
def words() -> ChatFormat:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = f"user assistant system {TEMPLATE.system} {TEMPLATE.slot} {' '.join(DRAFTS)} {MESSAGES[0]['content']}"
    vocabulary = ["<unk>", "<bos>", "<turn>", "<end>", *dict.fromkeys(text.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=["<turn>"],
    )
    fast.chat_template = (
        "<bos>{% for m in messages %}<turn> {{ m['role'] }}\n{{ m['content'] }} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn> assistant\n{% endif %}"
    )
    return ChatFormat(fast)


def aggregator(words: ChatFormat, room: int) -> Role:
    """An aggregator whose window holds a prompt of `room` tokens and an answer of `SHORT`."""
    engine = scripted(tokenizer="words", max_model_len=room + SHORT.max_tokens)
    return Role(engine=engine, format=words)


def proposer() -> Role:
    return role(scripted(answers=DRAFTS, max_model_len=WINDOW_IS_ENOUGH))


def plan(**fields: Any) -> Plan:
    return Plan(**{"num_proposals": 4, "aggregation": (SHORT,), "final": SHORT, **fields})


def num_needed(words: ChatFormat) -> int:
    """Return the number of tokens of the aggregation prompt with all drafts."""
    return words.count(TEMPLATE.messages(MESSAGES, DRAFTS))


def test_what_fits_to_the_last_token_is_left_alone(words: ChatFormat) -> None:
    part = aggregator(words, room=num_needed(words))
    answer = finished(run_plan(plan(length_policy="error"), proposer(), part)).answer
    assert (answer.inputs, answer.length_action) == ((0, 1, 2, 3), None)
    assert answer.num_prompt_tokens == num_needed(words)


@pytest.mark.parametrize(
    ("policy", "inputs", "action"),
    [
        ("drop_longest", (0, 2, 3), "drop_longest: dropped 1 of 4"),
        ("fewer", (0, 1, 2), "fewer: dropped 1 of 4"),
        ("truncate_each", (0, 1, 2, 3), "truncate_each: cut "),
    ],
)
def test_one_token_too_many_is_met_by_the_policy_and_recorded(
    words: ChatFormat, policy: LengthPolicy, inputs: tuple[int, ...], action: str
) -> None:
    part = aggregator(words, room=num_needed(words) - 1)
    answer = finished(run_plan(plan(length_policy=policy), proposer(), part)).answer
    assert answer.inputs == inputs
    assert answer.length_action is not None and answer.length_action.startswith(action)
    assert answer.num_prompt_tokens < num_needed(words)


def test_the_policy_error_ends_the_run_after_the_layer_below(words: ChatFormat) -> None:
    part = aggregator(words, room=num_needed(words) - 1)
    events, error = run_until_error(plan(length_policy="error"), proposer(), part)
    assert isinstance(error, PromptTooLong)
    assert len(drafts(events, 0)) == 4
    assert isinstance(part.engine, ScriptedEngine) and part.engine.requests == []


def test_hidden_layers_are_fitted_too_and_each_answer_says_so(words: ChatFormat) -> None:
    events = run_plan(plan(num_layers=2), proposer(), aggregator(words, room=num_needed(words) - 1))
    assert [answer.length_action for answer in drafts(events, 1)] == ["drop_longest: dropped 1 of 4"] * 4
    assert [answer.inputs for answer in drafts(events, 1)] == [(0, 2, 3)] * 4
    assert finished(events).answer.length_action is None  # the aggregations are short


def test_inputs_name_the_right_answers_when_order_and_length_policy_both_act(words: ChatFormat) -> None:
    answer = finished(
        run_plan(plan(shuffle=True), proposer(), aggregator(words, room=num_needed(words) - 1), run_seed=3)
    ).answer
    assert sorted(answer.inputs) == [0, 2, 3]
    assert list(answer.inputs) != [0, 2, 3]


def test_the_model_gets_exactly_the_ids_of_the_reported_messages(words: ChatFormat) -> None:
    part = aggregator(words, room=num_needed(words) - 1)
    end = finished(run_plan(plan(), proposer(), part))
    assert isinstance(part.engine, ScriptedEngine)
    [request] = part.engine.requests
    assert request.prompt_ids == words.prompt_ids(end.messages)
    assert request.prompt_ids.count(words.tokenizer.bos_token_id) == 1
    shown = words.decode(request.prompt_ids)
    assert ("rhine" in shown, "elbe" in shown) == (False, True)


def test_an_answer_as_long_as_the_window_leaves_no_room_for_a_prompt(words: ChatFormat) -> None:
    _, error = run_until_error(plan(num_layers=0, proposal=Sampling(max_tokens=64)), role(scripted(max_model_len=64)))
    assert isinstance(error, PromptTooLong)
    assert "layer 0: max_tokens 64 leaves no room for a prompt in the model's window of 64" in str(error)
    assert "Lower max_tokens, or raise" in str(error)
    wide = plan(num_layers=2, proposal=Sampling(max_tokens=8), aggregation=(Sampling(max_tokens=64),))
    _, error = run_until_error(wide, role(scripted(max_model_len=64)))
    assert "Lower max_tokens of the plan's aggregation, or raise" in str(error)


def test_a_conversation_that_does_not_fit_is_refused_before_any_request() -> None:
    engine = scripted(max_model_len=100)
    messages = ({"role": "user", "content": "river " * 500},)
    _, error = run_until_error(plan(proposal=SHORT), role(engine), messages=messages)
    assert isinstance(error, PromptTooLong)
    assert engine.requests == []


def test_cancelled_stragglers_are_charged_their_known_prompt(words: ChatFormat) -> None:
    """The length of an id prompt is known even if none of its answers came back."""
    engine = StallingEngine(stall_on={0, 1, 2, 3}, tokenizer="words")
    events, error = run_until_error(plan(deadline_s=0.3), Role(engine=engine, format=words))
    assert error is not None
    usage = layers_done(events)[0].usage
    assert usage.prompt_tokens == engine.num_prompt_tokens == 4 * words.count(MESSAGES)
    assert usage.completion_tokens == engine.num_tokens == 4 * 3


def test_a_request_refused_at_once_is_not_charged_its_prompt(words: ChatFormat) -> None:
    engine = scripted(tokenizer="words", fail_requests=True)
    events, error = run_until_error(plan(), Role(engine=engine, format=words))
    assert error is not None
    assert layers_done(events)[0].usage.prompt_tokens == 0
