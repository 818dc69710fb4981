"""What endpoints cost is booked, whatever came of it; a stage from which nothing useful came stops with a sentence."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aft_ray.config import Config
from aft_ray.data import scores, targets
from aft_ray.errors import TooManyFailures
from aft_ray.pipeline.running import say_yield
from aft_ray.records import PROPOSALS, SELECTION
from aft_ray.runs import Manifest, Run, write_manifest
from aft_ray.shards import Stage, make_shard, shard_name
from aft_ray.stages import run_stage
from aft_ray.storage import Folder
from tests.scripted_endpoint import ScriptedEndpoint

NUM_ROWS = 4


def run_of(folder: Path, endpoint: ScriptedEndpoint, **settings: Any) -> Run:
    """A run in which four prompts have two proposals each, with a remote teacher and a remote judge."""
    engine = endpoint.settings(prices={"prompt": 1.0, "completion": 10.0}, max_retries=0)
    config = Config.model_validate(
        {
            "run": {"dir": str(folder)},
            "engine": {"type": "scripted"},
            "targets": {"engine": engine},
            "scores": {"scorer": "judge", "judge": {"engine": engine}},
            "selection": {"num_proposals": 2},
            **settings,
        }
    )
    run = Run(config, Folder.at(str(folder)))
    for name, schema in (("proposals", PROPOSALS), ("selection", SELECTION)):
        rows = [{key: value for key, value in row(n).items() if key in schema.names} for n in range(NUM_ROWS)]
        for number in range(2):
            part = pa.Table.from_pylist(rows[2 * number :][:2], schema=schema)
            run.folder.child(name).write_table(shard_name(number), part)
        done = Manifest(stage=name, status="done", fingerprint=name, settings={}, rows_in=NUM_ROWS, rows_out=NUM_ROWS)
        write_manifest(run.folder.child(name), done)
    return run


def row(number: int) -> dict[str, Any]:
    proposal = {"source": "on-policy", "model": "m", "num_prompt_tokens": 1, "num_tokens": 1, "round": 1}
    return {
        "prompt_id": f"p-{number}",
        "messages": [{"role": "user", "content": f"Name river {number}."}],
        "split": "train",
        "proposals": [{**proposal, "text": text} for text in ("Nile", "Rhine, I think")],
        "selected": [0, 1],
    }


def finished(stage: Stage, max_failure_rate: float = 0.5) -> Manifest:
    """Make every shard in this process, then let the stage find that nothing is left to do."""

    async def work() -> None:
        worker = stage.worker()
        for name in stage.source.names(".parquet"):
            await make_shard(stage, name, worker)
        await worker.close()

    asyncio.run(work())
    return run_stage(stage, max_failure_rate=max_failure_rate)


NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "filtered": ({"finish_reason": "content_filter"}, "(4 finish reason content_filter)"),
    "cut": ({"finish_reason": "length"}, "(4 truncated target)"),
    "only reasons": ({"words": (), "reasoning": ("Let me see",)}, "(4 reasoning without an answer)"),
    "refuses": ({"refusal": "I must decline."}, "The first: finish reason refusal: I must decline."),
}


@pytest.mark.parametrize(("knobs", "words"), NOTHING.values(), ids=NOTHING)
def test_a_teacher_that_wrote_nothing_to_learn_stops_the_run(
    endpoint: ScriptedEndpoint, tmp_path: Path, knobs: dict[str, Any], words: str
) -> None:
    vars(endpoint).update(knobs)
    with pytest.raises(TooManyFailures, match="targets: none of 4 rows is usable") as stopped:
        finished(targets.stage(run_of(tmp_path, endpoint)))
    assert words in str(stopped.value)
    assert stopped.value.exit_code == 3


def test_a_judge_without_any_verdict_stops_the_run_with_what_it_said(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.words = ("I like both.",)
    with pytest.raises(TooManyFailures, match=r"scores: none of 4 rows is usable \(4 no score\)") as stopped:
        finished(scores.stage(run_of(tmp_path, endpoint)))
    assert "no verdict in 'I like both.'" in str(stopped.value)


def test_rows_without_a_verifier_are_of_use_to_a_run_that_scores_nothing(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    manifest = finished(scores.stage(run_of(tmp_path, endpoint, scores={"scorer": "auto"})))
    assert (manifest.status, manifest.rows_out, manifest.unusable) == ("done", 4, {})


def test_a_low_yield_is_said_and_goes_on(
    endpoint: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda body: "The Nile." if "river 0" in str(body) else " "
    manifest = finished(targets.stage(run_of(tmp_path, endpoint)))
    assert (manifest.status, manifest.rows_out, manifest.unusable) == ("done", 4, {"empty target": 3})
    say_yield(manifest)
    assert capsys.readouterr().err == ("targets: only 1 of 4 rows can be used by later stages (3 empty target)\n")


def test_a_run_that_allows_every_failure_goes_on_with_nothing(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    endpoint.finish_reason = "length"
    manifest = finished(targets.stage(run_of(tmp_path, endpoint)), max_failure_rate=1.0)
    assert (manifest.status, manifest.unusable) == ("done", {"truncated target": 4})


def test_answers_that_were_lost_are_on_the_account_of_rows_that_failed(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.finish_reason = "error"
    manifest = finished(targets.stage(run_of(tmp_path, endpoint)), max_failure_rate=1.0)
    assert (manifest.failed, manifest.rows_out) == ({"EngineError": 4}, 0)
    assert (manifest.prompt_tokens, manifest.completion_tokens) == (4 * 7, 4 * 3)
    assert manifest.cost_usd == pytest.approx(4 * (7 * 1 + 3 * 10) / 1e6)


def test_an_account_of_estimates_says_so(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    endpoint.usage = None
    stage = targets.stage(run_of(tmp_path, endpoint))
    manifest = finished(stage)
    assert (manifest.num_estimated, manifest.completion_tokens) == (4, 4 * 5)
    assert {row["target"]["usage_estimated"] for row in stage.output.rows()} == {True}
