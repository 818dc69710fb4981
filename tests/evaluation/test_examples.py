"""Which prompts are shown, and what is said of each answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aft_ray.evaluation.examples import Check, choose_examples

from .rows import answered, draft


def two_words(row: Mapping[str, Any], text: str) -> list[Check]:
    return [Check(name="two words", met=len(text.split()) == 2)]


def test_an_example_holds_drafts_and_answer_with_their_scores_and_checks() -> None:
    row = answered("p-1", ["right now", "wrong"], "half done")
    [example] = choose_examples("aft", [row], two_words)
    [drafts] = example.layers
    assert [(one.text, one.score, one.checks[0].met) for one in drafts] == [
        ("right now", 1.0, True),
        ("wrong", 0.0, False),
    ]
    assert (example.answer.text, example.answer.score, example.answer.num_tokens) == ("half done", 0.5, 2)
    assert example.messages[0]["content"] == "question p-1"


def test_a_failed_draft_is_shown_with_its_error_and_without_score_or_checks() -> None:
    row = answered("p-1", ["right", "wrong"], "right")
    row["layers"][0][1] = draft(1, "", error="engine died")
    [example] = choose_examples("aft", [row], two_words)
    failed = example.layers[0][1]
    assert (failed.error, failed.score, failed.checks) == ("engine died", None, ())


def test_the_final_layer_is_not_shown_twice() -> None:
    row = answered("p-1", ["right"], "right")
    row["layers"].append([draft(0, "right")])
    [example] = choose_examples("aft", [row])
    assert len(example.layers) == 1


def test_every_system_shows_the_same_prompts_whatever_their_order_and_answers() -> None:
    ids = [f"p-{n}" for n in range(20)]
    one = choose_examples("a", [answered(i, ["right"], "right") for i in ids], num_examples=3)
    two = choose_examples("b", [answered(i, ["wrong"], "wrong") for i in reversed(ids)], num_examples=3)
    assert [example.prompt_id for example in one] == [example.prompt_id for example in two]
    assert [example.prompt_id for example in one] != ids[:3]
    other = choose_examples("a", [answered(i, ["right"], "right") for i in ids], num_examples=3, seed=1)
    assert [example.prompt_id for example in one] != [example.prompt_id for example in other]
