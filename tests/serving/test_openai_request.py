"""From body to call: plans, aliases, limits, and refusals that name what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from aft_ray.config import ScriptedEngineConfig, ServingConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving.errors import HttpError
from aft_ray.serving.openai.body import ChatBody, CompletionBody
from aft_ray.serving.openai.request import ChatCall, call_of, split_alias

CONFIG = ServingConfig(
    engine=ScriptedEngineConfig(),
    adapters={"sft": "/adapters/sft", "aft": "/adapters/aft"},
    plan=Plan(num_proposals=5, num_layers=1, quorum=4, final=Sampling(temperature=0.7, max_tokens=64)),
    max_num_proposals=8,
    max_num_layers=3,
    max_tokens=1000,
)
USER = [{"role": "user", "content": "Name three rivers."}]


def call(**body: Any) -> ChatCall:
    return call_of(ChatBody.model_validate({"messages": USER, **body}), CONFIG)


def refusal(**body: Any) -> tuple[int, str, str]:
    with pytest.raises(HttpError) as caught:
        call(**body)
    return caught.value.status, caught.value.body.error.param, str(caught.value)


def test_a_plain_model_name_uses_the_servers_plan() -> None:
    assert call(model="base").plan == CONFIG.plan


def test_a_request_without_a_model_gets_the_last_adapter() -> None:
    assert (call().model, call().name) == ("aft", "aft")


def test_an_alias_does_not_change_which_model_it_is() -> None:
    assert call(model="base@k2-l1").name == "base"


def test_an_alias_chooses_width_and_depth() -> None:
    plan = call(model="sft@k4-l2").plan
    assert (plan.num_proposals, plan.num_layers) == (4, 2)
    assert call(model="sft@k4-l2").name == "sft"


def test_single_is_one_plain_sample() -> None:
    assert call(model="aft@single").plan.num_layers == 0


def test_the_aft_object_wins_over_the_alias() -> None:
    assert call(model="aft@k4-l2", aft={"num_layers": 3}).plan.num_layers == 3


def test_an_adapter_whose_name_holds_an_at_sign_is_found() -> None:
    config = CONFIG.model_copy(update={"adapters": {"aft@v2": "/adapters/v2"}})
    assert split_alias("aft@v2", config) == ("aft@v2", {})
    assert split_alias("aft@v2@single", config) == ("aft@v2", {"num_layers": 0})


def test_nested_sampling_changes_only_what_it_names() -> None:
    plan = call(aft={"proposal": {"temperature": 0.1}}).plan
    assert plan.proposal == Sampling(temperature=0.1, top_p=0.95)


def test_openai_sampling_applies_to_the_final_layer_alone() -> None:
    plan = call(temperature=0.2, top_p=0.5, max_tokens=9, stop="END").plan
    assert plan.final == Sampling(temperature=0.2, top_p=0.5, max_tokens=9, stop=("END",))
    assert plan.proposal == CONFIG.plan.proposal
    assert plan.aggregation == CONFIG.plan.aggregation


def test_openai_sampling_applies_to_the_only_answer_of_a_single_sample() -> None:
    assert call(model="aft@single", temperature=0, max_tokens=9).plan.proposal.temperature == 0


@pytest.mark.parametrize("name", ["final", "aggregation"])
@pytest.mark.parametrize("body", [{"aft": {"num_layers": 0}}, {"model": "aft@single"}], ids=["num_layers 0", "alias"])
def test_the_sampling_of_aggregations_is_refused_where_there_are_none(name: str, body: dict[str, Any]) -> None:
    sampling: Any = {"temperature": 0.1} if name == "final" else [{"temperature": 0.1}]
    status, param, message = refusal(**body | {"aft": {**body.get("aft", {}), name: sampling}})
    assert (status, param) == (400, f"aft.{name}")
    assert "with num_layers 0 nothing is aggregated" in message and "aft.proposal" in message
    assert call(model="aft@k2-l2", aft={name: sampling}).plan.num_layers == 2


def test_max_completion_tokens_is_the_newer_name_of_max_tokens() -> None:
    assert call(max_completion_tokens=7).plan.final.max_tokens == 7


def test_a_narrower_request_drops_the_servers_wider_quorum() -> None:
    assert call(aft={"num_proposals": 2}).plan.quorum is None
    assert call(aft={"num_proposals": 6}).plan.quorum == 4


def test_a_seed_fixes_the_run_and_none_draws_one() -> None:
    assert call(seed=7).run_seed == 7
    assert call().run_seed != call().run_seed


def test_content_parts_and_the_developer_role_become_plain_turns() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    body = {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]}
    assert call_of(ChatBody.model_validate(body), CONFIG).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there"},
    )


def test_a_prompt_is_one_user_turn() -> None:
    body = CompletionBody.model_validate({"prompt": "Name three rivers."})
    assert call_of(body, CONFIG).messages == tuple(USER)


@pytest.mark.parametrize("asked", [{"num_proposal": 3}, {"num_porposals": 3}])
def test_an_unknown_key_of_the_aft_object_is_refused_with_the_nearest_name(asked: dict[str, Any]) -> None:
    status, param, message = refusal(aft=asked)
    assert (status, param) == (400, f"aft.{next(iter(asked))}")
    assert "did you mean 'num_proposals'?" in message


def test_an_unknown_key_of_a_layers_sampling_is_refused_with_the_nearest_name() -> None:
    status, param, message = refusal(aft={"final": {"temprature": 1}})
    assert (status, param) == (400, "aft.final.temprature")
    assert "did you mean 'temperature'?" in message


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"num_layers": "deep"}, "aft.num_layers"),
        ({"num_proposals": 0}, "aft.num_proposals"),
        ({"final": {"temperature": -1}}, "aft.final.temperature"),
        ({"include_proposals": "yes"}, "aft.include_proposals"),
        ({"deadline_s": 0}, "aft.deadline_s"),
    ],
)
def test_a_wrong_value_in_the_aft_object_names_its_key(asked: dict[str, Any], param: str) -> None:
    status, found, message = refusal(aft=asked)
    assert (status, found) == (400, param)
    assert param in message


def test_a_quorum_that_no_layer_could_meet_is_refused() -> None:
    status, _, message = refusal(aft={"num_proposals": 2, "quorum": 3})
    assert status == 400
    assert "quorum 3 > num_proposals 2" in message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"aft": {"num_proposals": 9}}, "aft.num_proposals"),
        ({"model": "aft@k9-l1"}, "aft.num_proposals"),
        ({"aft": {"num_layers": 4}}, "aft.num_layers"),
        ({"aft": {"num_layers": 10**400}}, "aft.num_layers"),
        ({"max_tokens": 1001}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"messages": USER * 2000}, "messages"),
        ({"aft": {"proposal": {"max_tokens": 1001}}}, "max_tokens"),
        ({"aft": {"proposal": {"temperature": float("inf")}}}, "temperature"),
        ({"aft": {"deadline_s": 1e9}}, "aft.deadline_s"),
    ],
)
def test_a_request_beyond_the_servers_limits_names_the_limit(body: dict[str, Any], param: str) -> None:
    with pytest.raises(HttpError) as caught:
        call(**body)
    error = caught.value.body.error.model_dump()
    assert (caught.value.status, error["param"], error["code"]) == (400, param, "cap_exceeded")
    assert "allows at most" in error["message"]


@pytest.mark.parametrize("model", ["gpt-4o", "aft@deep", "gpt-4o@single", "aft@k3", "aft@k0-l", "@single"])
def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(model: str) -> None:
    status, param, message = refusal(model=model)
    assert (status, param) == (404, "model")
    assert "base, sft, aft" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "weather"}]),
        ("prediction", {"type": "content"}),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValidationError, HttpError), match=f"parameter '{name}' is not supported"):
        call(**{name: value})


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0.0},
        {"user": "u-1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": None, "tool_choice": "auto", "logit_bias": {}, "stream_options": {"include_usage": True}},
    ],
)
def test_parameters_that_ask_for_nothing_are_accepted(body: dict[str, Any]) -> None:
    assert call(**body).plan == CONFIG.plan


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(HttpError, match=r"unknown parameter 'temprature'; did you mean 'temperature'\?"):
        call(temprature=0.5)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "robot", "content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": "\ud800"}],
    ],
    ids=["none", "unknown role", "no content", "an image", "a lone surrogate"],
)
def test_messages_that_cannot_be_answered_are_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError):
        call(messages=messages)
