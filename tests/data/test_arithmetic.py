"""Looking up pairs in tables: right answers, partitions that share nothing, the same questions for a seed."""

from __future__ import annotations

import itertools

import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.arithmetic import MODULUS, PARTITIONS, answer_to, documents, fact, partition_of, questions
from aft_ray.data.prompts import read_prompts
from aft_ray.data.verifiers import verify
from aft_ray.errors import InputError


def test_every_place_is_looked_up_by_itself() -> None:
    assert answer_to("0702050012130301*1319061104000802") == "1603090112011110"
    assert answer_to("0702*1319") == answer_to("07*13") + answer_to("02*19")


def test_each_sign_has_a_table_of_its_own() -> None:
    pairs = [(left, right) for left in range(MODULUS) for right in range(MODULUS)]
    tables = {sign: [fact(left, sign, right) for left, right in pairs] for sign in "+-*"}
    for table in tables.values():
        assert set(table) == set(range(MODULUS))
    assert sum(a == b for a, b in zip(tables["+"], tables["-"], strict=True)) < 2 * len(pairs) / MODULUS


def test_the_numeric_verifier_compares_whole_answers() -> None:
    row = {"task": "numeric", "reference": "1603090112011110"}
    assert verify(row, "1603090112011110")
    assert not verify(row, "1603090112011111")
    assert not verify(row, "1503090112011110")  # wrong in the first place only
    assert not verify(row, "16030901120111")


def test_a_question_belongs_to_one_partition_whatever_the_seed() -> None:
    drawn = {name: set(itertools.islice(questions(name, seed), 300)) for seed, name in enumerate(PARTITIONS)}
    for name, texts in drawn.items():
        assert {partition_of(text) for text in texts} == {name}
        assert len(texts) == 300


def test_a_seed_draws_the_same_questions_and_another_seed_others() -> None:
    first, again, other = (set(itertools.islice(questions("tuning", seed), 100)) for seed in (1, 1, 2))
    assert first == again
    assert len(first & other) < 10


def test_documents_ask_some_questions_again_and_none_of_another_partition() -> None:
    made = list(itertools.islice(documents(seed=5), 200))
    assert {len(pairs) for pairs in made} == {1, 2, 3, 4, 5}
    assert all(answer == answer_to(question) for pairs in made for question, answer in pairs)
    assert {partition_of(question) for pairs in made for question, _ in pairs} == {"pretraining"}
    assert 0.4 < sum(len(dict(pairs)) < len(pairs) for pairs in made) / len(made) < 0.8


def test_the_source_gives_questions_with_references_for_the_numeric_verifier() -> None:
    (row,) = read_prompts(PromptsConfig(source="arithmetic:tuning", limit=1), seed=1)
    question = row["messages"][0]["content"]
    assert (row["reference"], row["task"]) == (answer_to(question), "numeric")
    with pytest.raises(InputError, match=r"expected arithmetic: and one of pretraining, tuning, final"):
        list(read_prompts(PromptsConfig(source="arithmetic:test")))
