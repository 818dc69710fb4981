"""One or several proposers share the work; off-policy answers become proposals; a policy handles missing ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aft_ray.config import Config, ProposalsConfig
from aft_ray.data.proposals import ProposalWorker, parts
from aft_ray.errors import ConfigError, EngineError, InputError
from aft_ray.shards import Processed

SCRIPTED = {"type": "scripted"}
OTHER = {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "other"}


def config(proposals: dict[str, Any], num_selected: int = 2, engine: dict[str, Any] | None = None) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "engine": engine or SCRIPTED,
            "prompts": {"responses": "ultrafeedback"},
            "proposals": proposals,
            "selection": {"num_proposals": num_selected},
        }
    )


def row(*texts: str) -> dict[str, Any]:
    responses = [{"text": text, "model": f"m{n}", "score": None} for n, text in enumerate(texts)]
    return {
        "prompt_id": "p-1",
        "messages": [{"role": "user", "content": "Name a river."}],
        "responses": responses or None,
    }


def through(config: Config, row: dict[str, Any]) -> Processed:
    """Return the row after all proposers have run."""
    done = Processed(rows=[row])
    for part in parts(config.proposals):
        done = asyncio.run(ProposalWorker(config, part).process(done.rows[0]))
    return done


@pytest.mark.parametrize(
    ("num", "weights", "expected"),
    [
        (8, [1], [8]),
        (8, [1, 1], [4, 4]),
        (8, [3, 1], [6, 2]),
        (5, [1, 1], [3, 2]),
        (4, [100, 1], [3, 1]),
        (7, [2, 1], [5, 2]),
        (4, [10, 1, 1, 1], [1, 1, 1, 1]),
        (8, [10, 1, 1, 1], [5, 1, 1, 1]),
    ],
)
def test_the_shares_add_up_and_every_proposer_gets_one(num: int, weights: list[float], expected: list[int]) -> None:
    settings = {"num_per_prompt": num, "proposers": [{"share": w} for w in weights]}
    made = [part.num_proposals for part in parts(ProposalsConfig.model_validate(settings))]
    assert made == expected
    assert sum(made) == num


def test_more_proposers_than_proposals_are_refused() -> None:
    with pytest.raises(ValueError, match="num_per_prompt 2"):
        config({"num_per_prompt": 2, "proposers": [{}, {}, {}]})


def test_proposers_run_one_after_the_other_and_never_share_a_seed() -> None:
    made = through(
        config({"num_per_prompt": 6, "proposers": [{"share": 2, "name": "a"}, {"share": 1, "name": "b"}]}), row()
    )
    proposals = made.rows[0]["proposals"]
    assert [proposal["model"] for proposal in proposals] == ["a"] * 4 + ["b"] * 2
    assert len({proposal["seed"] for proposal in proposals}) == 6
    assert len({proposal["text"] for proposal in proposals}) == 6
    assert {proposal["source"] for proposal in proposals} == {"on-policy"}


def test_off_policy_answers_keep_the_name_of_their_model_and_the_source_order() -> None:
    made = through(
        config({"num_per_prompt": 3, "proposers": [{"source": "off_policy"}]}),
        row("one", "two", "three", "four", "five"),
    )
    proposals = made.rows[0]["proposals"]
    assert len(proposals) == 3
    models = [proposal["model"] for proposal in proposals]
    assert models == sorted(models)
    assert {(p["source"], p["seed"], p["finish_reason"]) for p in proposals} == {("off-policy", None, None)}


MIXED = {"num_per_prompt": 4, "proposers": [{"source": "off_policy"}, {"source": "on_policy"}]}


@pytest.mark.parametrize(("responses", "expected"), [((), 4), (("one",), 4), (("one", "two"), 4), (("one",) * 9, 4)])
def test_the_last_proposer_fills_up_missing_proposals(responses: tuple[str, ...], expected: int) -> None:
    made = through(config({**MIXED, "too_few": "fill"}), row(*responses))
    assert len(made.rows[0]["proposals"]) == expected


def test_a_prompt_with_too_few_proposals_is_kept_dropped_or_failed_by_policy() -> None:
    off_policy = {"num_per_prompt": 4, "proposers": [{"source": "off_policy"}]}
    assert len(through(config(off_policy), row("one")).rows[0]["proposals"]) == 1
    dropped = through(config({**off_policy, "too_few": "drop"}), row("one"))
    assert (dropped.rows, dropped.filtered) == ([], "too few proposals")
    with pytest.raises(InputError, match=r"1 usable proposals, but selection\.num_proposals is 2"):
        through(config({**off_policy, "too_few": "fail"}), row("one"))
    with pytest.raises(InputError, match="0 usable proposals"):
        through(config(off_policy), row())


def test_the_tokens_of_dropped_rows_are_counted() -> None:
    failing = {**SCRIPTED, "empty_on": [0, 1, 2, 3]}
    done = through(config({"num_per_prompt": 4, "too_few": "drop"}, engine=failing), row())
    assert done.filtered == "too few proposals"
    assert done.prompt_tokens > 0


def test_a_second_round_is_written_on_its_proposals() -> None:
    first = through(config({"num_per_prompt": 2}), row()).rows[0]["proposals"]
    second = through(config({"num_per_prompt": 2, "adapter": "runs/one/model/aft"}), row()).rows[0]["proposals"]
    named = through(config({"num_per_prompt": 2, "adapter": "x", "round": 5}), row()).rows[0]["proposals"]
    assert [{p["round"] for p in some} for some in (first, second, named)] == [{1}, {2}, {5}]
    assert {p["model"] for p in second} == {"runs/one/model/aft"}


def test_a_failed_sample_is_kept_and_a_prompt_without_any_fails() -> None:
    one = through(config({"num_per_prompt": 3}, engine={**SCRIPTED, "fail_on": [1]}), row()).rows[0]["proposals"]
    assert [bool(proposal["error"]) for proposal in one] == [False, True, False]
    with pytest.raises(EngineError, match="none of 3 samples"):
        through(config({"num_per_prompt": 3}, engine={**SCRIPTED, "fail_on": [0, 1, 2]}), row())


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ({"too_few": "fill"}, "needs `proposers` that end with an on_policy one"),
        (
            {"too_few": "fill", "proposers": [{"source": "off_policy"}]},
            "needs `proposers` that end with an on_policy one",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_refused(proposals: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config({"num_per_prompt": 4, **proposals})


def test_an_off_policy_proposer_without_prompts_responses_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"set prompts\.responses to"):
        Config.model_validate(
            {
                "run": {"dir": "unused"},
                "engine": SCRIPTED,
                "proposals": {"num_per_prompt": 4, "proposers": [{"source": "off_policy"}]},
            }
        )


def test_another_model_makes_off_policy_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    made = config({"num_per_prompt": 4, "proposers": [{}, {"engine": OTHER}]})
    sources = [ProposalWorker(made, part).writer.source for part in parts(made.proposals)]  # type: ignore[union-attr]
    assert sources == ["on-policy", "off-policy"]


def test_the_error_of_a_remote_proposer_without_a_key_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = config({"num_per_prompt": 4, "proposers": [{}, {"engine": OTHER}]})
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        ProposalWorker(made, parts(made.proposals)[1])
