"""The best candidate becomes the target, filters leave some targets out, and the cost is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import Config, TargetFilters
from aft_ray.data.proposals import data_stages
from aft_ray.data.target_filters import is_refusal, why_left_out
from aft_ray.data.target_scores import TargetScoreWorker
from aft_ray.data.targets import ReferenceWorker, TargetWorker, best_candidate, last_stage
from aft_ray.data.training_set import TrainingSetWorker, shown_proposals, unusable
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import Target

GOOD, SHORT_GOOD, BAD = "it all adds up to 42", "42", "It is 41."


def config(targets: dict[str, Any], answers: list[str], **others: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "engine": {"type": "scripted", "answers": answers, **others.pop("engine", {})},
            "targets": {"num_candidates": len(answers), "sampling": {"max_tokens": 12}, **targets},
            **others,
        }
    )


def row(task: str | None = "numeric", reference: str | None = "42") -> dict[str, Any]:
    proposals = [
        {"text": text, "error": None, "score": score, "model": "m", "source": "on-policy", "round": 1}
        for text, score in (("I say 42", 1.0), ("I say 7", 0.0))
    ]
    return {
        "prompt_id": "p-1",
        "messages": [{"role": "user", "content": "What is six times seven?"}],
        "reference": reference,
        "task": task,
        "metadata": None,
        "split": "train",
        "proposals": proposals,
        "selected": [1, 0],
    }


def target_of(made: Config, row: dict[str, Any]) -> dict[str, Any]:
    """The row after `targets`, and after `target_scores` where the config has that stage."""
    written = asyncio.run(TargetWorker(made).process(row)).rows[0]
    return asyncio.run(TargetScoreWorker(made).process(written)).rows[0] if made.scores_targets else written


@pytest.mark.parametrize(
    ("keep", "text", "others"),
    [("best", GOOD, []), ("first", GOOD, []), ("shortest", SHORT_GOOD, []), ("all", GOOD, [SHORT_GOOD])],
)
def test_the_policy_keeps_candidates_that_the_verifier_accepts(keep: str, text: str, others: list[str]) -> None:
    made = target_of(config({"keep": keep}, [BAD, GOOD, SHORT_GOOD]), row())
    assert made["target"]["text"] == text
    assert [target["text"] for target in made["accepted_targets"]] == others
    assert (made["target"]["num_accepted"], made["target"]["num_candidates"]) == (2, 3)
    assert made["target_filter"] is None


@pytest.mark.parametrize(
    ("scores", "best"),
    [([-1.3, None], 0), ([None, -1.3], 1), ([None, 0.0], 1), ([None, None], 0), ([-2.0, -1.3], 1), ([0.5, 0.5], 0)],
)
def test_an_unscored_candidate_never_beats_a_scored_one(scores: list[float | None], best: int) -> None:
    candidates = [target("Nile", finish_reason="stop", score=score) for score in scores]
    assert best_candidate(candidates) is candidates[best]


def test_a_row_without_an_accepted_candidate_is_kept_but_not_trained_on() -> None:
    made = target_of(config({"keep": "first"}, [BAD, BAD]), row())
    assert made["target_filter"] == "no accepted candidate"
    assert made["target"]["num_accepted"] == 0
    assert target_of(config({"keep": "best"}, [BAD, BAD]), row())["target_filter"] == "rejected by the verifier"


@pytest.mark.parametrize("keep", ["best", "first"])
def test_the_judge_scores_targets_if_there_are_several_candidates_and_the_verifier_otherwise(keep: str) -> None:
    scores = {"scorer": "judge", "judge": {"engine": {"type": "scripted", "answers": ["B"]}}}
    judged = target_of(config({"keep": keep}, [BAD, GOOD], scores=scores), row())
    alone = target_of(config({"keep": keep}, [GOOD], scores=scores), row())
    # the scripted judge prefers whichever answer comes second, so that neither wins over both orders
    assert judged["target"]["score"] == (0.5 if keep == "best" else None)
    assert alone["target"]["score"] is None, "nothing to choose, so nothing is scored"


@pytest.mark.parametrize(
    ("targets", "scorer", "is_scored"),
    [
        ({"num_candidates": 2}, "auto", True),
        ({"num_candidates": 2}, "none", False),
        ({"num_candidates": 1}, "auto", False),
        ({"num_candidates": 2, "keep": "first"}, "auto", False),
        ({"num_candidates": 1, "filters": {"worse_than_best": True}}, "auto", True),
        ({"source": "reference", "num_candidates": 2}, "auto", False),
        ({"source": "reference", "filters": {"worse_than_best": True}}, "numeric", True),
    ],
)
def test_targets_are_scored_only_where_a_choice_or_a_filter_needs_it(
    targets: dict[str, Any], scorer: str, is_scored: bool
) -> None:
    made = Config.model_validate(
        {"run": {"dir": "unused"}, "engine": {"type": "scripted"}, "targets": targets, "scores": {"scorer": scorer}}
    )
    assert made.scores_targets is is_scored
    assert ("target_scores" in data_stages(made)) is is_scored
    assert last_stage(made) == ("target_scores" if is_scored else "targets")


def test_a_reward_model_is_never_loaded_by_the_teachers_worker() -> None:
    made = config({"num_candidates": 2}, [BAD, GOOD], scores={"scorer": "reward_model", "reward_model": "/no/such"})
    written = asyncio.run(TargetWorker(made).process(row())).rows[0]
    assert [candidate["text"] for candidate in written["candidates"]] == [BAD, GOOD]
    assert [candidate["score"] for candidate in written["candidates"]] == [None, None]
    with pytest.raises(ConfigError, match="/no/such"):
        TargetScoreWorker(made)


def test_the_scores_choose_the_target_and_every_candidate_keeps_its_score() -> None:
    made = config({"num_candidates": 2}, [SHORT_GOOD, GOOD], scores={"scorer": "length"})
    chosen = target_of(made, row())
    assert chosen["target"]["text"] == GOOD
    assert [candidate["score"] for candidate in chosen["candidates"]] == [len(SHORT_GOOD), len(GOOD)]
    filters = {"worse_than_best": True, "rejected": False}
    worse = target_of(config({"num_candidates": 1, "filters": filters}, [BAD], scores={"scorer": "numeric"}), row())
    assert (worse["target"]["score"], worse["target_filter"]) == (0.0, "worse than the best proposal")


def test_a_policy_that_relies_on_the_verifier_needs_one() -> None:
    with pytest.raises(InputError, match="needs a verifier"):
        target_of(config({"keep": "first"}, [GOOD]), row(task=None))


def test_the_pseudo_target_is_written_without_the_proposals() -> None:
    worker = TargetWorker(config({"pseudo": True, "num_candidates": 2}, [GOOD, SHORT_GOOD]))
    made = asyncio.run(worker.process(row())).rows[0]
    aggregation, alone = worker.engine.requests  # type: ignore[attr-defined]
    assert any("I say 7" in message["content"] for message in aggregation.messages)
    assert not any("I say 7" in message["content"] for message in alone.messages)
    assert made["pseudo_target"]["text"] == GOOD
    assert not set(aggregation.seeds) & set(alone.seeds)


def test_a_reference_target_needs_a_reference_and_no_model() -> None:
    worker = ReferenceWorker(config({"source": "reference"}, [BAD]))
    made = asyncio.run(worker.process(row())).rows[0]
    assert (made["target"]["text"], made["target"]["verified"], made["target"]["model"]) == ("42", True, "reference")
    with pytest.raises(InputError, match="no reference answer"):
        asyncio.run(worker.process(row(reference=None)))


def target(text: str, **others: Any) -> Target:
    known = dict(model="m", finish_reason="stop", num_tokens=3, verified=None, score=None, num_candidates=1)
    return Target(text=text, **{**known, "num_accepted": None, **others})  # type: ignore[arg-type]


UNFINISHED = ("content_filter", "tool_calls", "function_call", "abort", "error", "refusal", None)
EVERY = TargetFilters(refused=True, max_similarity=0.9, worse_than_best=True)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (target("  "), "empty target"),
        (target("", reasoning="Let me see"), "reasoning without an answer"),
        (target("so it goes", finish_reason="length"), "truncated target"),
        *((target("The first step is", finish_reason=odd), f"finish reason {odd}") for odd in UNFINISHED),
        (target("so it goes", verified=False), "rejected by the verifier"),
        (target("I'm sorry, but I can't help with that."), "refused target"),
        (target("the Nile is  long"), "copies a proposal"),
        (target("the Nile is long and wide and deep", score=0.4), "worse than the best proposal"),
        (target("the Nile is long and wide and deep", score=0.5), None),
        (target("the Nile is long and wide and deep"), None),
    ],
)
def test_every_filter_names_its_reason(made: Target, reason: str | None) -> None:
    assert why_left_out(made, ["the Nile is long", "Rhine"], [0.5, None], EVERY) == reason


def test_disabled_filters_leave_out_only_empty_targets() -> None:
    off = TargetFilters(finish_reasons=("stop", "length"), rejected=False)
    made = target("I cannot help with that", finish_reason="length", verified=False)
    assert why_left_out(made, ["x"], [1.0], off) is None
    assert why_left_out(target(""), ["x"], [1.0], off) == "empty target"


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't assist with that request.", True),
        ("I cannot provide instructions for this.", True),
        ("Sorry, I am unable to help with that.", True),
        ("As an AI language model, I cannot answer that.", True),
        ("You cannot divide by zero.", False),
        ("Sorry is the hardest word, sang Elton John.", False),
        ("I can't wait for summer! Here are three ideas.", False),
        ("To write a poem, I would start with a line.", False),
        ("I cannot discuss that topic.", True),
        ("Sorry, I can't.", True),
        ("I must decline.", True),
        ("I’m really sorry, but I can’t help with that.", True),
        ("I'm sorry, but I can't assist with that. However, I'd be happy to suggest a safer experiment.", True),
        ("I won't write that. Please ask a professional instead.", True),
        ("We are unable to provide medical advice.", True),
        ("I cannot help but admire this poem.", False),
        ("I can't provide an exact figure, but about 40 million people live there, most of them in cities.", False),
        ("Unfortunately, I can't access live data, but you can look the score up on the league's page.", False),
        ("I can't believe how well this works.", False),
        ("I can no longer recommend the first edition.", False),
        ("Ich kann das nicht.", False),
    ],
)
def test_a_refusal_is_distinguished_from_an_answer(text: str, refusal: bool) -> None:
    assert is_refusal(text) is refusal


def test_max_similarity_decides_which_near_copies_are_left_out() -> None:
    draft = "Walk by the river in the morning, then rest under the old bridge until noon."
    edited = draft.replace("noon", "night")
    for threshold, reason in ((1.0, None), (0.8, "copies a proposal")):
        assert why_left_out(target(edited), ["Rhine", draft], [], TargetFilters(max_similarity=threshold)) == reason
    assert why_left_out(target(draft.upper()), [draft], [], TargetFilters(max_similarity=1.0)) == "copies a proposal"


# ── the training set made from them ──────────────────────────────────────────────────────────────────────────────────


def examples_of(made: Config, row: dict[str, Any]) -> list[dict[str, Any]]:
    worker = TrainingSetWorker(made.training_set, made.engine, made.templates, made.run.seed)
    return asyncio.run(worker.process(row)).rows


def full_row(tokenizer: str, variants: list[str], **targets: Any) -> tuple[Config, dict[str, Any]]:
    made = config(
        {"pseudo": True, **targets},
        [GOOD, SHORT_GOOD],
        engine={"tokenizer": tokenizer},
        training_set={"variants": variants},
    )
    return made, target_of(made, row())


def test_each_variant_shows_the_parts_that_its_name_says(chatml_tokenizer: str) -> None:
    variants = ["sft", "aft", "joint", "sft_reference", "no_proposals", "pseudo"]
    made, row = full_row(chatml_tokenizer, variants)
    examples = {example["example_id"]: example for example in examples_of(made, row)}
    shows = {name: "I say 7" in example["prompt_text"] for name, example in examples.items()}
    assert shows == {
        "p-1-sft": False,
        "p-1-aft": True,
        "p-1-joint-propose": False,
        "p-1-joint-aggregate": True,
        "p-1-sft_reference": False,
        "p-1-no_proposals": False,
        "p-1-pseudo": True,
    }
    assert "drafts" in examples["p-1-no_proposals"]["prompt_text"]
    assert examples["p-1-sft_reference"]["target_text"] == "42"
    assert examples["p-1-sft"]["input_ids"] == examples["p-1-joint-propose"]["input_ids"]
    assert examples["p-1-aft"]["input_ids"] == examples["p-1-joint-aggregate"]["input_ids"]


def test_every_accepted_target_makes_an_example_of_its_own(chatml_tokenizer: str) -> None:
    made, row = full_row(chatml_tokenizer, ["sft", "aft"], keep="all")
    examples = examples_of(made, row)
    assert [example["example_id"] for example in examples] == ["p-1-sft", "p-1-sft-2", "p-1-aft", "p-1-aft-2"]
    assert [example["target_text"] for example in examples] == [GOOD, SHORT_GOOD] * 2


def test_a_row_left_out_is_counted_with_its_reason(chatml_tokenizer: str) -> None:
    made, row = full_row(chatml_tokenizer, ["sft"])
    worker = TrainingSetWorker(made.training_set, made.engine, made.templates, made.run.seed)
    done = asyncio.run(worker.process({**row, "target_filter": "refused target"}))
    assert (done.rows, done.filtered) == ([], "refused target")
    assert unusable({**row, "pseudo_target": None}, ["sft", "pseudo"]) == "empty or truncated pseudo target"


def test_the_number_of_shown_proposals_varies_by_prompt_and_not_by_run() -> None:
    made = config({}, [GOOD], training_set={"vary_num_proposals": [1, 2]}, selection={"num_proposals": 2})
    rows = [{**row(), "prompt_id": f"p-{n}"} for n in range(40)]
    shown = [shown_proposals(one, made.training_set, seed=1) for one in rows]
    assert {len(texts) for texts in shown} == {1, 2}
    assert all(texts == ["I say 7", "I say 42"][: len(texts)] for texts in shown), (
        "the first ones, in the order selected"
    )
    assert shown == [shown_proposals(one, made.training_set, seed=1) for one in rows]


@pytest.mark.parametrize(
    ("thinking", "text"), [("remove", "It is 42."), ("keep", "<think>\n6 x 7\n</think>\n\nIt is 42.")]
)
def test_thinking_is_neither_verified_nor_a_target_unless_it_is_kept(
    chatml_tokenizer: str, thinking: str, text: str
) -> None:
    made = config(
        {"num_candidates": 1},
        ["<think>\n6 x 7\n</think>\n\nIt is 42."],
        engine={"tokenizer": chatml_tokenizer},
        training_set={"variants": ["sft"], "thinking": thinking},
    )
    written = target_of(made, row())
    target = written["target"]
    assert (target["text"], target["reasoning"], target["verified"]) == ("It is 42.", "6 x 7", True)
    assert 0 < target["num_reasoning_tokens"] < target["num_tokens"]
    (example,) = examples_of(made, written)
    assert example["target_text"] == text


def test_tokens_of_thinking_do_not_make_an_answer_long() -> None:
    long, short = "It is 42, as it always was.", "<think>\none two three four five six\n</think>\n42"
    made = target_of(config({"keep": "shortest", "sampling": {"max_tokens": 40}}, [long, short]), row())
    assert made["target"]["text"] == "42"


def test_thinking_is_not_kept_for_a_model_whose_tokenizer_has_tags_of_its_own(tmp_path: Path) -> None:
    from tests.templates.families import make_tokenizer

    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path)
    made = config({}, [GOOD], engine={"tokenizer": str(tmp_path)}, training_set={"thinking": "keep"})
    with pytest.raises(ConfigError, match="control tokens of that name"):
        examples_of(made, row())
