"""Rewards, flips, lengths and costs of a handful of visible answers."""

from __future__ import annotations

import pyarrow as pa
import pytest

from aft_ray.evaluation.metrics import Flips, compare, score_answers, system_metrics
from aft_ray.evaluation.scores import SCORED_ANSWERS

from .rows import answered, draft, usage


def test_single_is_the_mean_over_drafts_and_then_over_prompts() -> None:
    rows = [answered("p-1", ["right", "wrong"], "right"), answered("p-2", ["wrong", "wrong", "half"], "wrong")]
    metrics = system_metrics("aft", score_answers(rows))
    assert metrics.single.mean == pytest.approx((1 / 2 + 0.5 / 3) / 2)
    assert metrics.final.mean == pytest.approx(1 / 2)
    assert metrics.gain.mean == pytest.approx(((1 - 1 / 2) + (0 - 0.5 / 3)) / 2)
    assert (metrics.single.num, metrics.num_layers, metrics.num_proposals) == (2, 1, 3)


def test_the_best_draft_is_taken_prompt_by_prompt() -> None:
    rows = [answered("p-1", ["right", "wrong"], "wrong"), answered("p-2", ["wrong", "half"], "right")]
    metrics = system_metrics("aft", score_answers(rows))
    assert metrics.best_draft.mean == pytest.approx(0.75)
    assert metrics.best_draft_pass.mean == pytest.approx(0.5)


def test_pass_rates_count_only_the_full_reward() -> None:
    rows = [answered("p-1", ["right", "half"], "half"), answered("p-2", ["wrong", "half"], "right")]
    metrics = system_metrics("aft", score_answers(rows))
    assert metrics.single_pass.mean == pytest.approx(0.25)
    assert metrics.final_pass.mean == pytest.approx(0.5)


def test_a_text_without_a_score_is_in_no_mean_and_is_counted() -> None:
    rows = [answered("p-1", ["right", "unclear"], "unclear"), answered("p-2", ["unclear", "unclear"], "right")]
    metrics = system_metrics("aft", score_answers(rows))
    assert (metrics.single.mean, metrics.single.num, metrics.single.num_missing) == (1.0, 1, 1)
    assert (metrics.final.mean, metrics.final.num, metrics.final.num_missing) == (1.0, 1, 1)
    assert (metrics.gain.mean, metrics.gain.num) == (None, 0)
    assert (metrics.num_unscored_drafts, metrics.num_unscored_finals) == (3, 1)
    assert metrics.flips == Flips()


def test_a_failed_draft_is_not_scored_and_counts_as_missing_with_cancelled_ones() -> None:
    row = answered("p-1", ["right", "wrong"], "right")
    row["layers"] = [[draft(0, "right"), draft(1, "right and lost", error="engine died")]]
    row["usage"][0] = usage(0, 1, 1, num_failed=1, num_cancelled=2)
    metrics = system_metrics("aft", score_answers([row]), num_failed=3)
    assert metrics.single.mean == 1.0
    assert (metrics.num_missing_drafts, metrics.num_unscored_drafts, metrics.num_failed) == (3, 0, 3)
    assert metrics.draft_tokens.mean == 1
    assert metrics.num_proposals == 4


def test_at_l_0_the_one_answer_is_the_single_answer_and_nothing_is_gained() -> None:
    metrics = system_metrics("base", score_answers([answered("p-1", [], "right"), answered("p-2", [], "half")]))
    assert metrics.num_layers == 0
    assert metrics.single == metrics.final
    assert metrics.single.mean == pytest.approx(0.75)
    assert (metrics.gain.num, metrics.best_draft.num, metrics.flips) == (0, 0, Flips())
    assert metrics.final_tokens.mean == 1


def test_flips_count_pairs_of_draft_and_final_answer() -> None:
    rows = [
        answered("kept", ["right", "wrong"], "right"),
        answered("lost", ["right", "half"], "wrong"),
        answered("found", ["wrong", "half"], "right"),
        answered("spoilt", ["right", "right"], "half"),
        answered("never", ["wrong", "wrong"], "wrong"),
    ]
    metrics = system_metrics("aft", score_answers(rows))
    assert metrics.flips == Flips(
        right_to_right=1,
        right_to_wrong=3,
        wrong_to_right=3,
        wrong_to_wrong=3,
        all_wrong=2,
        all_wrong_to_right=1,
        all_right=1,
        all_right_to_wrong=1,
    )
    net = (metrics.flips.wrong_to_right - metrics.flips.right_to_wrong) / metrics.flips.num_pairs
    assert metrics.final_pass.mean is not None and metrics.single_pass.mean is not None
    assert net == pytest.approx(metrics.final_pass.mean - metrics.single_pass.mean)


def test_lengths_tokens_and_seconds_are_those_of_the_answers() -> None:
    rows = [answered("p-1", ["right a b", "wrong"], "right a b c"), answered("p-2", ["right a", "half a"], "wrong")]
    metrics = system_metrics("aft", score_answers(rows))
    assert metrics.draft_tokens.mean == pytest.approx(2)
    assert metrics.final_tokens.mean == pytest.approx(2.5)
    assert metrics.seconds.mean == pytest.approx(2)
    assert [layer.prompt_tokens for layer in metrics.layers] == [40, 20]
    assert [layer.completion_tokens for layer in metrics.layers] == [8, 5]
    assert [layer.cached_tokens for layer in metrics.layers] == [20, 10]


def test_systems_are_compared_on_the_prompts_that_both_answered() -> None:
    first = score_answers([answered("p-1", [], "right"), answered("p-2", [], "half")])
    second = score_answers([answered("p-3", [], "right"), answered("p-1", [], "half")])
    one = compare(("aft", first), ("base", second))
    assert (one.difference.mean, one.difference.num, one.difference.num_missing) == (0.5, 1, 2)


def test_no_answers_give_no_numbers() -> None:
    metrics = system_metrics("aft", [], num_failed=4)
    assert (metrics.num_prompts, metrics.num_failed, metrics.final.mean, metrics.layers) == (0, 4, None, ())


def test_rows_keep_their_metrics_through_the_arrow_schema() -> None:
    rows = [answered("p-1", ["right", "half"], "right"), answered("p-2", [], "wrong")]
    through = pa.Table.from_pylist(rows, schema=SCORED_ANSWERS).to_pylist()
    assert through == rows
    assert score_answers(through) == score_answers(rows)
