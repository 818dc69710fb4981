"""Of several similar prompts the first is kept, in any language, with the same result every time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.duplicates import NearDuplicates, plain_text, shingles
from aft_ray.data.prompts.removal import Sifter
from aft_ray.errors import ConfigError
from tests.data.test_prompts import write_jsonl

LONG = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def jaccard(one: str, other: str) -> float:
    a, b = set(shingles(one)), set(shingles(other))
    return len(a & b) / len(a | b)


def test_the_compared_text_is_all_user_turns_normalised() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ｎａｍｅ\n a  RIVER."},
        {"role": "assistant", "content": "Nile."},
        {"role": "user", "content": "Straße?"},
    ]
    assert plain_text(turns) == "name a river. strasse?"  # type: ignore[arg-type]


def test_shingles_are_the_distinct_runs_of_five_characters() -> None:
    assert shingles("abcdef") == ["abcde", "bcdef"]
    assert shingles("aaaaaaaa") == ["aaaaa"]
    assert shingles("尼罗河") == ["尼罗河"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LONG, LONG.replace("48", "49")),
        (LONG, LONG.replace("Natalia", "Natalie")),
        (
            "请用三句话介绍一下长江的地理位置、长度和它对中国历史的影响。",
            "请用三句话介绍一下长江的地理位置、长度和它对中国历史的影响！",
        ),
        ("Hi", "hi "),
    ],
    ids=["number", "name", "chinese", "short"],
)
def test_the_second_of_two_similar_prompts_resembles_the_first(first: str, second: str) -> None:
    near = NearDuplicates(0.7, seed=1)
    assert near.earlier("p-1", plain_text([{"role": "user", "content": first}])) is None
    assert near.earlier("p-2", "something else entirely, about rivers and boats") is None
    assert near.earlier("p-3", plain_text([{"role": "user", "content": second}])) == "p-1"


def test_removals_agree_with_the_exact_similarity_within_the_error_of_the_estimate() -> None:
    draw = random.Random(0)
    words = [f"{draw.choice('bcdfghklmnprst')}{draw.choice('aeiou')}{n}" for n in range(400)]
    base = [" ".join(draw.sample(words, 40)) for _ in range(60)]
    changed = []
    for text in base:
        copy = text.split()
        for _ in range(draw.randrange(12)):
            copy[draw.randrange(40)] = "changed"
        changed.append(" ".join(copy))
    near = NearDuplicates(0.7, seed=3)
    assert all(near.earlier(f"b{n}", text) is None for n, text in enumerate(base))
    for n, text in enumerate(changed):
        similarity, found = jaccard(base[n], text), near.earlier(f"c{n}", text)
        if abs(similarity - 0.7) > 0.15:  # over three standard errors
            assert (found == f"b{n}") == (similarity > 0.7), similarity


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.95, 1.0])
def test_every_threshold_works(threshold: float) -> None:
    near = NearDuplicates(threshold, seed=20250122)
    assert [near.earlier(name, LONG) for name in ("a", "b")] == [None, "a"]


def test_an_index_that_cannot_grow_names_the_folder_that_needs_space() -> None:
    near = NearDuplicates(0.8, seed=1)
    near._index._database.execute("PRAGMA max_page_count = 40")  # a full disk
    with pytest.raises(ConfigError, match=r"prompts\.near_duplicates: the temporary index .*full.*SQLITE_TMPDIR"):
        for n in range(1000):
            near.earlier(f"p-{n}", f"{random.Random(n).random()}")


def test_a_megabyte_of_text_is_compared_too() -> None:
    draw = random.Random(0)
    text = "".join(draw.choices("abcdefghij ", k=1_000_000))
    near = NearDuplicates(0.8, seed=1)
    assert [near.earlier(name, text) for name in ("a", "b")] == [None, "a"]


def test_removed_rows_name_the_prompt_they_resemble_and_a_second_pass_agrees(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "prompts.jsonl",
        {"prompt": LONG, "prompt_id": "a"},
        {"prompt": "Name a river.", "prompt_id": "b"},
        {"prompt": LONG.upper() + "!", "prompt_id": "c"},
    )
    config = PromptsConfig(source=source, near_duplicates=0.8)
    sifted = list(Sifter(config, seed=0).sift())
    assert [(row.reason, row.resembles) for row in sifted] == [(None, None), (None, None), ("near duplicate", "a")]
    assert list(Sifter(config, seed=0).sift()) == sifted
