"""Prompts that share n consecutive words with an evaluation prompt, or equal a short one, are removed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.decontamination import EvaluationSets, words_of
from aft_ray.data.prompts.duplicates import plain_text
from aft_ray.data.prompts.removal import Sifter
from aft_ray.errors import InputError
from tests.data.test_prompts import write_jsonl

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Public evaluation sets, beside the checkout where somebody put them."""

QUESTION = "A farmer has nine sheep, sells two of them on Monday and buys five more on Friday. How many are left?"


def known(*texts: str, ngram: int = 13) -> EvaluationSets:
    sets = EvaluationSets(ngram)
    for number, text in enumerate(texts):
        sets.add("test", f"test:{number}", plain(text))
    return sets


def plain(text: str) -> str:
    return plain_text([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop: 3.5 km!", ["don", "t", "stop", "3", "5", "km"]),
        ("Crème brûlée", ["creme", "brulee"]),
        ("我爱 Python编程", ["我", "爱", "python", "编", "程"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("हिन्दी भाषा", ["हनद", "भष"]),
        (":-)", []),
    ],
    ids=["english", "accents", "chinese", "japanese", "hindi", "signs"],
)
def test_words_are_letters_and_digits_or_characters_where_words_are_not_spaced(text: str, words: list[str]) -> None:
    assert words_of(plain(text)) == words


def test_korean_words_stay_whole() -> None:
    assert len(words_of(plain("서울 타워"))) == 2


@pytest.mark.parametrize(
    ("prompt", "overlaps"),
    [
        (QUESTION, True),
        (f"Solve this. {QUESTION.upper().replace(',', ' ;')} Think step by step.", True),
        (" ".join(QUESTION.split()[:13]), True),
        (" ".join(QUESTION.split()[:12]), False),
        (QUESTION.replace("Monday", "Tuesday"), False),  # 10 words before it and 10 after it
        ("Name a river.", False),
    ],
    ids=["same", "within", "13-words", "12-words", "broken", "other"],
)
def test_thirteen_consecutive_words_are_an_overlap(prompt: str, overlaps: bool) -> None:
    assert (known("Name a lake.", QUESTION).overlap(plain(prompt)) == ("test", "test:1")) is overlaps


@pytest.mark.parametrize(
    ("prompt", "overlaps"), [("What is 2 + 2", True), ("Tell me, what is 2+2?", False), ("What is 2", False)]
)
def test_a_short_evaluation_prompt_overlaps_only_an_identical_prompt(prompt: str, overlaps: bool) -> None:
    assert (known("what is 2+2?").overlap(plain(prompt)) is not None) is overlaps


def test_prompts_without_any_word_are_compared_as_they_are() -> None:
    assert known(":-)").overlap(plain(":-)")) is not None
    assert known(":-)").overlap(plain(":-(")) is None


def test_chinese_is_compared_by_character() -> None:
    question = "小明有九个苹果，给了小红三个，又买了五个，他现在一共有多少个苹果？"
    assert known(question).overlap(plain(f"请回答：{question}")) is not None
    assert known(question).overlap(plain("小明有九个橘子，吃了两个。")) is None


def test_a_removal_names_the_evaluation_set_whatever_its_columns(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", {"question": QUESTION, "answer": "twelve"})
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "Nile."}]
    second = write_jsonl(tmp_path / "second.jsonl", {"messages": turns}, {"instruction": "Translate.", "input": "eau"})
    source = write_jsonl(
        tmp_path / "prompts.jsonl", *({"prompt": t} for t in ("Ok.", QUESTION, "Name a river", "Translate. Eau!"))
    )
    config = PromptsConfig(source=source, decontaminate=(first, second))
    assert [(row.reason, row.resembles) for row in Sifter(config, seed=0).sift()] == [
        (None, None),
        (f"overlaps {first}", f"{first}:1"),
        (f"overlaps {second}", f"{second}:1"),
        (f"overlaps {second}", f"{second}:2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.decontaminate .*evaluation\.jsonl: no such file"),
        ("\n", r"prompts\.decontaminate .*evaluation\.jsonl: the source has no rows"),
        (
            '{"text": "a"}',
            r"evaluation\.jsonl:1: no prompt; expected one of messages, .* found columns: text. Rename the column",
        ),
        ("{", r"evaluation\.jsonl:1: not valid JSON"),
    ],
    ids=["missing", "empty", "no-prompt", "unreadable"],
)
def test_an_evaluation_set_that_cannot_be_used_ends_the_run(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "evaluation.jsonl"
    if content is not None:
        path.write_text(content)
    source = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": "a"})
    config = PromptsConfig(source=source, decontaminate=(str(path),), on_bad_row="record")
    with pytest.raises(InputError, match=message):
        list(Sifter(config, seed=0).sift())


def reasons(source: Path, *evaluation: str) -> Counter[str | None]:
    config = PromptsConfig(source=str(source), decontaminate=evaluation, duplicates="drop")
    return Counter(row.reason for row in Sifter(config, seed=0).sift())


@pytest.mark.skipif(not (REAL / "gsm8k/train.jsonl").exists(), reason="no evaluation sets beside the checkout")
def test_gsm8k_train_is_clean_of_its_test_set_and_a_leaked_half_is_found_whole(tmp_path: Path) -> None:
    train, test = REAL / "gsm8k/train.jsonl", REAL / "gsm8k/test_public.jsonl"
    rows: list[dict[str, Any]] = json.loads((REAL / "math_short/MultiArith.json").read_text())
    multi_arith = write_jsonl(tmp_path / "multi_arith.jsonl", *({"question": row["sQuestion"]} for row in rows))
    found = reasons(train, str(test), multi_arith)
    assert found.total() == 7473
    assert found[None] > 7400
    leaked = tmp_path / "leaked.jsonl"
    leaked.write_text(train.read_text() + test.read_text())
    assert reasons(leaked, str(test))[f"overlaps {test}"] == 658 + found[f"overlaps {test}"]
