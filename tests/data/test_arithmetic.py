"""Chains of operations modulo twenty: right answers, partitions that share nothing, the same questions for a seed."""

from __future__ import annotations

import itertools

import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.arithmetic import PARTITIONS, documents, partition_of, questions, worked
from aft_ray.data.prompts import read_prompts
from aft_ray.errors import InputError
from aft_ray.inference.answers import final_number


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("07+13*02-19*05", "07,00,00,01,05"),
        ("00-19-19", "00,01,02"),
        ("19*19*19", "19,01,19"),
        ("03-05*07", "03,18,06"),
    ],
)
def test_every_running_total_is_written_modulo_twenty(question: str, answer: str) -> None:
    assert worked(question) == answer


def test_the_verifier_reads_the_last_total() -> None:
    for question in itertools.islice(questions("final", seed=3), 50):
        assert final_number(worked(question)) == int(worked(question)[-2:])


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
    assert all(answer == worked(question) for pairs in made for question, answer in pairs)
    assert {partition_of(question) for pairs in made for question, _ in pairs} == {"pretraining"}
    assert 0.4 < sum(len(dict(pairs)) < len(pairs) for pairs in made) / len(made) < 0.8


def test_the_source_gives_questions_with_references_for_the_numeric_verifier() -> None:
    (row,) = read_prompts(PromptsConfig(source="arithmetic:tuning", limit=1), seed=1)
    question = row["messages"][0]["content"]
    assert (row["reference"], row["task"]) == (worked(question), "numeric")
    with pytest.raises(InputError, match=r"expected arithmetic: and one of pretraining, tuning, final"):
        list(read_prompts(PromptsConfig(source="arithmetic:test")))
