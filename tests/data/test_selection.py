"""Proposals are selected by rank, by dissimilarity or at random, and prompts by difficulty."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aft_ray.config import Config, SelectionConfig
from aft_ray.data.selection import (
    SelectionWorker,
    easy_below,
    is_easy,
    most_diverse,
    prompt_hash,
    select,
    spread,
    stage,
)
from aft_ray.data.similarity import similarity
from aft_ray.errors import InputError
from aft_ray.records import HELD_OUT, SCORES, TRAIN, Proposal, to_row
from aft_ray.runs import Manifest, Run, write_manifest
from aft_ray.shards import Processed
from aft_ray.storage import Folder

STRATEGIES = ["top_k", "random", "stratified", "diverse"]


def proposal(text: str, score: float | None, error: str | None = None) -> dict[str, Any]:
    return to_row(
        Proposal(
            text=text,
            source="on-policy",
            model="m",
            seed=0,
            finish_reason="stop",
            num_prompt_tokens=1,
            num_tokens=1,
            error=error,
            score=score,
        )
    )


def proposals(*scores: float | None) -> list[dict[str, Any]]:
    return [proposal(f"answer number {i}", score) for i, score in enumerate(scores)]


def config(strategy: str = "top_k", num: int = 4, **settings: Any) -> SelectionConfig:
    return SelectionConfig.model_validate({"strategy": strategy, "num_proposals": num, **settings})


def kept(given: list[dict[str, Any]], settings: SelectionConfig, seed: int = 0) -> list[int]:
    return select(given, settings, random.Random(seed))[0]


# ── every strategy ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_selection_has_k_different_usable_proposals_and_is_reproducible(strategy: str) -> None:
    draw = random.Random(strategy)
    for seed in range(300):
        given = [
            proposal(draw.choice(["", "a", "b c d", "x " * 20]), draw.choice([None, 0.0, 0.5, draw.random()]))
            for _ in range(draw.randint(1, 9))
        ]
        for one in given:
            one["error"] = draw.choice([None, None, "failed"])
        usable = [i for i, one in enumerate(given) if one["text"] and not one["error"]]
        settings = config(strategy, draw.randint(1, 6), shuffle=draw.random() < 0.5)
        if not usable:
            with pytest.raises(InputError, match="no usable proposals"):
                kept(given, settings, seed)
            continue
        chosen = kept(given, settings, seed)
        assert len(chosen) == len(set(chosen)) == min(settings.num_proposals, len(usable))
        assert set(chosen) <= set(usable)
        assert chosen == kept(given, settings, seed)
        assert settings.shuffle or chosen == sorted(chosen)


@pytest.mark.parametrize("strategy", ["top_k", "stratified"])
def test_unscored_proposals_are_selected_only_if_there_are_too_few_scored_ones(strategy: str) -> None:
    given = proposals(None, 0.2, None, 0.9, 0.5, None)
    for seed in range(20):
        assert set(kept(given, config(strategy, 3), seed)) == {1, 3, 4}
        assert {1, 3, 4} < set(kept(given, config(strategy, 5), seed))


def test_unscored_proposals_are_drawn_by_seed() -> None:
    given = proposals(*[None] * 6)
    chosen = {tuple(kept(given, config("top_k", 2, shuffle=False), seed)) for seed in range(200)}
    assert chosen == set(itertools.combinations(range(6), 2))
    assert select(given, config(), random.Random(0))[1] == "random: no scores"


@pytest.mark.parametrize(
    ("strategy", "scores", "reason"),
    [
        ("top_k", (1, 2, 3, 4), "top_k"),
        ("top_k", (1, 2), "top_k, 2 of 4 usable"),
        ("random", (1, 2, 3, 4), "random"),
        ("stratified", (1, 2, 3, 4, 5, None), "stratified over 5 scored"),
        ("stratified", (None,) * 5, "random: no scores"),
        ("diverse", (1, 2, 3, 4), "diverse"),
        ("diverse", (None,) * 5, "diverse: no scores"),
    ],
)
def test_the_reason_says_how_the_proposals_were_chosen(strategy: str, scores: tuple[Any, ...], reason: str) -> None:
    assert select(proposals(*scores), config(strategy), random.Random(0))[1] == reason


def test_the_selected_proposals_are_shuffled_so_that_the_position_does_not_reveal_the_best() -> None:
    given = proposals(4, 3, 2, 1)
    firsts = [kept(given, config(), seed)[0] for seed in range(400)]
    assert all(70 < firsts.count(i) < 130 for i in range(4))
    assert kept(given, config(shuffle=False)) == [0, 1, 2, 3]


# ── stratified ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num", range(2, 9))
@pytest.mark.parametrize("total", range(1, 30))
def test_the_spread_has_the_best_the_worst_and_even_steps(total: int, num: int) -> None:
    places = spread(range(total), num)
    assert len(set(places)) == len(places) == min(num, total)
    assert places[0] == 0 and places[-1] == total - 1
    steps = [b - a for a, b in itertools.pairwise(places)]
    assert not steps or max(steps) - min(steps) <= 1


def test_stratified_takes_every_level_of_quality() -> None:
    given = proposals(0.3, 0.8, 0.1, 0.6, 0.5, 0.2, 0.7, 0.4)  # best to worst: 1 6 3 4 7 0 5 2
    assert kept(given, config("stratified", 4, shuffle=False)) == sorted([1, 3, 0, 2])
    assert kept(proposals(0.1, 0.9, 0.5), config("stratified", 1)) == [2]


# ── diverse ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("one two three four five six seven eight", "one two three four five six seven eight", 1.0),
        ("one two three four five six seven eight", "ONE  two three\nfour five six seven eight", 1.0),
        ("a b c d e f g h", "a b c d e f g x", 5 / 7),
        ("a b c d e f g h", "i j k l m n o p", 0.0),
        ("abcd", "abce", 1 / 3),
        ("ab", "ab", 1.0),
        ("ab", "ac", 0.0),
        ("", "", 1.0),
    ],
)
def test_similarity_is_the_share_of_common_n_grams(first: str, second: str, expected: float) -> None:
    assert similarity(first, second) == similarity(second, first) == pytest.approx(expected)


def test_diverse_selects_the_best_proposal_and_then_dissimilar_ones() -> None:
    best = "the quick brown fox jumps over the lazy dog today"
    given = [
        proposal(best, 1.0),
        proposal(best.replace("today", "now"), 0.9),
        proposal("an entirely other answer made of words that nobody else has used", 0.6),
        proposal("bad", 0.0),
    ]
    chosen = {weight: set(kept(given, config("diverse", 2, diversity=weight))) for weight in (0.0, 0.5)}
    assert chosen == {0.0: {0, 1}, 0.5: {0, 2}}


def test_without_weight_on_diversity_it_is_top_k() -> None:
    draw = random.Random(0)
    for seed in range(100):
        given = proposals(*[draw.random() for _ in range(8)])
        assert set(kept(given, config("diverse", 3, diversity=0.0), seed)) == set(kept(given, config(num=3), seed))


def test_an_unscored_proposal_counts_as_the_worst_and_equal_scores_as_the_best() -> None:
    given = [proposal("abcdef", 5.0), proposal("ghijkl", 5.0), proposal("mnopqr", None)]
    assert most_diverse([2, 1, 0], given, 3, diversity=0.5) == [1, 0, 2]


def test_copies_are_selected_last_if_no_proposal_has_a_score() -> None:
    given = [proposal(text, None) for text in ("same text", "same text", "same text", "unlike", "another")]
    for seed in range(20):
        assert {3, 4} < set(kept(given, config("diverse", 3), seed))


# ── easy and hard prompts ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scores", "easy"),
    [
        ([1.0, 1.0, 0.0], True),
        ([1.0, 0.0, 0.5], False),
        ([1.0, 0.0], True),
        ([0.99], False),
        ([1.0, None, None], True),
        ([0.0, None], False),
        ([None, None], None),
        ([], None),
    ],
)
def test_a_prompt_is_hard_when_most_of_its_scored_proposals_are_wrong(
    scores: list[float | None], easy: bool | None
) -> None:
    assert is_easy(scores) is easy


def scored_row(name: str, *scores: float | None, split: str = TRAIN) -> dict[str, Any]:
    return {
        "prompt_id": name,
        "messages": [{"role": "user", "content": name}],
        "reference": None,
        "task": None,
        "metadata": None,
        "split": split,
        "responses": None,
        "proposals": proposals(*scores),
        "scorer": "numeric",
    }


def write_scores(folder: Folder, rows: list[dict[str, Any]], rows_per_shard: int = 64) -> None:
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        table = pa.Table.from_pylist(rows[start : start + rows_per_shard], schema=SCORES)
        folder.write_table(f"shard-{number:05d}.parquet", table)


EASY, HARD = (1.0, 1.0, 0.0), (0.0, 0.0, 1.0)
ROWS = [
    *[scored_row(f"easy-{i}", *EASY) for i in range(500)],
    *[scored_row(f"hard-{i}", *HARD) for i in range(100)],
    *[scored_row(f"open-{i}", None, None) for i in range(20)],
    *[scored_row(f"held-{i}", *EASY, split=HELD_OUT) for i in range(30)],
]


def survivors(rows: list[dict[str, Any]], threshold: int, seed: int = 7) -> list[str]:
    worker = SelectionWorker(config(num=2), seed, threshold)

    async def work() -> list[Processed]:
        return [await worker.process(row) for row in rows]

    done = asyncio.run(work())
    assert {one.filtered for one in done if not one.rows} <= {"easy prompt"}
    return [one.rows[0]["prompt_id"] for one in done if one.rows]


@pytest.mark.parametrize(("ratio", "num_easy"), [(0, 0), (0.5, 50), (1, 100), (2.34, 234), (5, 500), (99, 500)])
def test_easy_per_hard_limits_the_easy_prompts_and_keeps_all_others(
    tmp_path: Path, ratio: float, num_easy: int
) -> None:
    folder = Folder.at(tmp_path / "scores")
    write_scores(folder, ROWS)
    names = survivors(ROWS, easy_below(folder, ratio, seed=7))
    counts = {kind: sum(name.startswith(kind) for name in names) for kind in ("easy", "hard", "open", "held")}
    assert counts == {"easy": num_easy, "hard": 100, "open": 20, "held": 30}


def test_which_easy_prompts_are_kept_depends_on_the_seed_and_not_on_the_shards(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    write_scores(Folder.at(tmp_path / "one"), ROWS)
    write_scores(Folder.at(tmp_path / "two"), shuffled, rows_per_shard=37)
    first, second = (easy_below(Folder.at(tmp_path / name), 1, seed=7) for name in ("one", "two"))
    assert first == second
    assert set(survivors(ROWS, first)) == set(survivors(shuffled, second))
    other = survivors(ROWS, easy_below(Folder.at(tmp_path / "one"), 1, seed=8), seed=8)
    assert set(other) != set(survivors(ROWS, first))


def test_a_set_without_hard_prompts_keeps_no_easy_one(tmp_path: Path) -> None:
    rows = [scored_row("a", *EASY), scored_row("b", *EASY)]
    write_scores(Folder.at(tmp_path), rows)
    assert survivors(rows, easy_below(Folder.at(tmp_path), 1, seed=7)) == []


def test_the_hash_of_a_prompt_is_spread_over_64_bits() -> None:
    drawn = [prompt_hash(f"p-{i}", 0) for i in range(4000)]
    assert len(set(drawn)) == len(drawn)
    assert 900 < sum(number < 1 << 62 for number in drawn) < 1100


def run_of(folder: Path, **selection: Any) -> Run:
    raw = {"run": {"dir": str(folder)}, "engine": {"type": "scripted"}, "selection": selection}
    return Run.open(Config.model_validate(raw))


def finish_scores(run: Run, rows: list[dict[str, Any]]) -> None:
    folder = run.folder.child("scores")
    write_scores(folder, rows)
    write_manifest(folder, Manifest(stage="scores", status="done", fingerprint="f", settings={}, rows_out=len(rows)))


def test_the_stage_counts_prompts_only_when_the_scores_are_finished(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", easy_per_hard=1)
    before = stage(run)
    finish_scores(run, ROWS)
    after = stage(run)
    early, late = before.worker(), after.worker()
    assert isinstance(early, SelectionWorker) and isinstance(late, SelectionWorker)
    assert early.easy_below is None
    assert late.easy_below == easy_below(run.folder.child("scores"), 1, run.config.run.seed)
    assert before.settings == after.settings


def test_without_a_ratio_the_scores_are_not_read_and_every_prompt_is_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    finish_scores(run, ROWS)
    run.folder.child("scores").write_bytes("shard-00000.parquet", b"not read")
    worker = stage(run).worker()
    assert isinstance(worker, SelectionWorker)
    assert worker.easy_below is None


def test_a_run_removes_surplus_easy_prompts_and_counts_them(tmp_path: Path, ray_cluster: None) -> None:
    from aft_ray.stages import run_stage

    run = run_of(tmp_path / "run", easy_per_hard=1, num_proposals=2)
    finish_scores(run, ROWS)
    manifest = run_stage(stage(run), max_failure_rate=0)
    assert (manifest.rows_in, manifest.rows_out, manifest.filtered) == (650, 250, {"easy prompt": 400})
    assert run_stage(stage(run), max_failure_rate=0) == manifest
