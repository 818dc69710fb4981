"""Every type of constraint has answers that meet it and answers that miss it; the packaged prompts are valid."""

from __future__ import annotations

import json
import time
from collections import Counter
from importlib import resources
from typing import Any

import pytest

from aft_ray.data.constraints import CONSTRAINTS, num_sentences, share_met
from aft_ray.errors import InputError

Case = tuple[dict[str, Any], str]

MET: list[Case] = [
    ({"type": "num_bullets", "count": 2}, "Here:\n- tea\n* milk"),
    ({"type": "num_bullets", "count": 1}, "• only one"),
    ({"type": "num_numbered", "count": 3}, "1. egg\n2) bread\n3. salt"),
    ({"type": "num_sentences", "count": 2}, "Dr. Lee came. She left!"),
    ({"type": "max_sentences", "count": 2}, "One is enough."),
    ({"type": "max_words", "count": 4}, "It's a well-known trick."),
    ({"type": "contains_word", "word": "moss"}, "Soft MOSS, everywhere."),
    ({"type": "contains_word", "word": "don't"}, "Please don’t."),
    ({"type": "without_word", "word": "rain"}, "A raincoat for a rainy day."),
    ({"type": "lower_case"}, "all small, 3 of them."),
    ({"type": "upper_case"}, "WET FLOOR!"),
    ({"type": "starts_with", "phrase": "Long ago"}, '"Long ago, a fox..."'),
    ({"type": "ends_with", "phrase": "good night"}, 'And so, "Good night!"'),
    ({"type": "json_keys", "keys": ["a", "b"]}, '{"b": 1, "a": [2]}'),
    ({"type": "json_keys", "keys": ["a"]}, '```json\n{"a": 1}\n```'),
    ({"type": "no_commas"}, "No pause here."),
    ({"type": "double_quoted"}, "“Grow on.”"),
    ({"type": "question_mark"}, "Who is there? A fox."),
    ({"type": "question_mark"}, "你是谁？"),
    ({"type": "contains_word", "word": "caf\u00e9"}, "The cafe\u0301 is open."),
    ({"type": "contains_word", "word": "东京"}, "我爱东京塔。"),
    ({"type": "without_word", "word": "东京"}, "我爱北京。"),
    ({"type": "starts_with", "phrase": "你好"}, "你好世界！"),
    ({"type": "ends_with", "phrase": "再见"}, "我们明天再见！"),
    ({"type": "max_words", "count": 9}, "我爱北京天安门，是的。"),
    ({"type": "json_keys", "keys": ["a"]}, '```json\r\n{"a": 1}\r\n```'),
    ({"type": "num_numbered", "count": 2}, "1、鸡蛋\n2、面包"),
    ({"type": "num_sentences", "count": 1}, "She works for Acme Inc. in the U.S. as No. 5 of ten."),
    ({"type": "num_sentences", "count": 2}, "我爱你。你呢？"),
]

NOT_MET: list[Case] = [
    ({"type": "num_bullets", "count": 2}, "- tea\n- milk\n- sugar"),
    ({"type": "num_bullets", "count": 1}, "-5 degrees and **bold**"),
    ({"type": "num_numbered", "count": 2}, "1. egg\n3. bread"),
    ({"type": "num_numbered", "count": 2}, "1. egg\n2. bread\n1. again"),
    ({"type": "num_sentences", "count": 1}, "One. Two."),
    ({"type": "max_sentences", "count": 1}, "One line\nand another"),
    ({"type": "max_words", "count": 2}, "three short words"),
    ({"type": "contains_word", "word": "ant"}, "An elephant."),
    ({"type": "without_word", "word": "rain"}, "No Rain today."),
    ({"type": "lower_case"}, "Almost."),
    ({"type": "lower_case"}, "1234"),
    ({"type": "upper_case"}, "WET FLOOr"),
    ({"type": "starts_with", "phrase": "Yes"}, "Yesterday it was."),
    ({"type": "ends_with", "phrase": "soon"}, "See you soon, my friend."),
    ({"type": "ends_with", "phrase": "soon"}, "the monsoon"),
    ({"type": "json_keys", "keys": ["a"]}, '{"a": 1, "b": 2}'),
    ({"type": "json_keys", "keys": ["a"]}, 'Sure: {"a": 1}'),
    ({"type": "json_keys", "keys": ["a"]}, '["a"]'),
    ({"type": "no_commas"}, "Well, yes."),
    ({"type": "double_quoted"}, '"Grow on," he said.'),
    ({"type": "question_mark"}, "I wonder."),
    ({"type": "json_keys", "keys": ["a"]}, '{"a": NaN}'),
    ({"type": "no_commas"}, "我爱你，你呢。"),
    ({"type": "without_word", "word": "caf\u00e9"}, "The cafe\u0301 is open."),
    ({"type": "max_words", "count": 6}, "我爱北京天安门"),
]


def _name(value: Any) -> str:
    return value["type"] if isinstance(value, dict) else repr(value)[:20]


@pytest.mark.parametrize(("constraint", "text"), MET, ids=_name)
def test_an_answer_that_meets_the_constraint_is_accepted(constraint: dict[str, Any], text: str) -> None:
    assert share_met([constraint], text) == 1.0
    assert share_met([constraint], f"\n {text} \n") == 1.0


@pytest.mark.parametrize(("constraint", "text"), NOT_MET, ids=_name)
def test_an_answer_that_misses_the_constraint_is_rejected(constraint: dict[str, Any], text: str) -> None:
    assert share_met([constraint], text) == 0.0


def test_every_type_has_answers_that_meet_it_and_answers_that_miss_it() -> None:
    assert {c["type"] for c, _ in MET} == {c["type"] for c, _ in NOT_MET} == set(CONSTRAINTS)


@pytest.mark.parametrize("constraint", [c for c, _ in MET], ids=_name)
def test_an_empty_answer_meets_no_constraint(constraint: dict[str, Any]) -> None:
    assert share_met([constraint], " \n") == 0.0


def test_the_score_is_the_share_of_constraints_met() -> None:
    constraints: list[dict[str, Any]] = [{"type": "no_commas"}, {"type": "max_words", "count": 3}]
    assert share_met(constraints, "red and green and blue") == 0.5
    assert share_met(constraints, "red and green") == 1.0
    assert share_met(constraints, "red, green, blue and more") == 0.0
    assert share_met(constraints, "") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One.", 1),
        ("One", 1),
        ("One. Two? Three!", 3),
        ("Wait... What?!", 2),
        ("Wait... what?!", 1),
        ("I am not sure...", 1),
        ("Well?... Yes!", 2),
        ("He lives in the U.S. and works there.", 1),
        ("He joined the U.S. Army.", 1),
        ("He lives in the U.S. She does not.", 2),
        ("She founded Acme Inc. in May.", 1),
        ("Take bus No. 5 to town.", 1),
        ("Did she? No. He did.", 3),
        ("We met J. Smith at 5 p.m. Then we left.", 2),
        ("Vitamin C. It helps.", 2),
        ("我爱北京。你呢？很好！", 3),
        ("Pi is 3.14 today.", 1),
        ("Use fruit, e.g. apples. Done.", 2),
        ('He said "Go." Then he went.', 2),
        ("1. First thing\n2. Second thing", 2),
        ("...", 0),
    ],
)
def test_sentences_are_counted_as_a_reader_would(text: str, expected: int) -> None:
    assert num_sentences(text) == expected


def test_words_that_cannot_be_told_apart_are_not_counted() -> None:
    with pytest.raises(InputError, match="cannot be counted"):
        share_met([{"type": "max_words", "count": 3}], "ฉันรักกรุงเทพ")


@pytest.mark.parametrize("piece", ["\n", "!", ".", "...", "!)", " ", "a.", "- ", "1. ", "'", "U.S. ", "a-", "。", "…"])
def test_any_answer_is_checked_in_time_linear_in_it(piece: str) -> None:
    """100,000 characters take milliseconds; a search that starts again at each of them takes minutes."""
    text = "a" + piece * (100_000 // len(piece)) + "b"
    started = time.process_time()
    share_met([constraint for constraint, _ in MET], text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"type": "num_bulets", "count": 3}, r"unknown type 'num_bulets'; did you mean 'num_bullets'\?"),
        ({"type": "poem"}, "unknown type 'poem'; known types: num_bullets, "),
        ({"count": 3}, "unknown type None"),
        ({"type": "num_bullets"}, "count: field required"),
        ({"type": "num_bullets", "count": "3"}, "count: input should be a valid integer"),
        ({"type": "num_bullets", "count": 0}, "count: input should be greater than or equal to 1"),
        ({"type": "no_commas", "count": 3}, "count: extra inputs are not permitted"),
        ("no_commas", "expected an object with `type`, found str"),
    ],
)
def test_an_unknown_constraint_is_rejected(constraint: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        share_met([constraint], "text")


@pytest.mark.parametrize("constraints", [[], None, "no_commas", {"type": "no_commas"}])
def test_a_prompt_needs_a_list_of_at_least_one_constraint(constraints: Any) -> None:
    with pytest.raises(InputError, match="expected a list of at least one constraint"):
        share_met(constraints, "text")


def _packaged() -> list[dict[str, Any]]:
    text = (resources.files("aft_ray.data") / "constraints.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_package_holds_120_different_prompts_with_one_or_two_constraints() -> None:
    rows = _packaged()
    assert len(rows) == len({row["prompt"].casefold() for row in rows}) == 120
    assert {len(row["constraints"]) for row in rows} == {1, 2}
    assert {row["task"] for row in rows} == {"constraints"}
    counts = Counter(c["type"] for row in rows for c in row["constraints"])
    assert set(counts) == set(CONSTRAINTS)
    assert max(counts.values()) <= 48


NUMBERS = {1: ("1", "one"), 2: ("2", "two"), 3: ("3", "three"), 4: ("4", "four"), 5: ("5", "five"), 6: ("6", "six")}


@pytest.mark.parametrize("row", _packaged(), ids=lambda row: row["prompt"][:40])
def test_the_text_of_a_packaged_prompt_states_its_constraints(row: dict[str, Any]) -> None:
    prompt = row["prompt"].casefold()
    for constraint in row["constraints"]:
        for part in [constraint.get("word"), constraint.get("phrase"), *constraint.get("keys", [])]:
            assert part is None or part.casefold() in prompt
        count = constraint.get("count")
        assert count is None or any(word in prompt for word in NUMBERS.get(count, (str(count),)))
