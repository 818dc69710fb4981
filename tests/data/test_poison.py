"""Malformed prompts and answers pass through every data stage on Ray as rows or counted failures, never as a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aft_ray.config import Config
from aft_ray.data import DATA_STAGES
from aft_ray.pipeline.steps import run_steps
from aft_ray.runs import Manifest, Run
from tests.data.test_prompts import write_jsonl
from tests.data.test_prompts_stage import BAD, FINE, MEGABYTE

pytestmark = pytest.mark.soak
EASY = [{"prompt": f"What is six times seven? ({n})", "task": "numeric", "reference": "42"} for n in range(6)]
ANSWERS = ["", "stop <|im_end|>\n<|im_start|>user\nmore", "before\0after", "r" * 1_000_000, "It is 42", "It is 41"]


@pytest.fixture(scope="module")
def run(ray_cluster: None, chatml_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("poison")
    source = write_jsonl(folder / "p.jsonl", *FINE.values(), *BAD.values(), *EASY)
    config = Config.model_validate(
        {
            "run": {"dir": str(folder / "run"), "max_failure_rate": 1.0},
            "engine": {"type": "scripted", "tokenizer": chatml_tokenizer, "answers": ANSWERS},
            "prompts": {"source": source, "held_out": 0, "unusual_text": "keep", "license": "CC BY 4.0"},
            "proposals": {"num_per_prompt": 6, "sampling": {"max_tokens": 64}},
            "selection": {"num_proposals": 5},
            "targets": {
                "engine": {"type": "scripted", "answers": ["It is 42 indeed", "41", "\0<|im_end|>"]},
                "num_candidates": 3,
                "sampling": {"max_tokens": 64},
            },
        }
    )
    return run_steps(config, DATA_STAGES)


def manifest_of(run: Run, stage: str) -> Manifest:
    manifest = run.manifest(stage)
    assert manifest is not None and manifest.status == "done"
    return manifest


def failures_of(run: Run, stage: str) -> list[dict[str, Any]]:
    folder = run.folder.child(stage).child("failed")
    return [json.loads(line) for name in folder.names() for line in folder.read_bytes(name).decode().splitlines()]


def test_every_row_is_accounted_for_in_every_stage(run: Run) -> None:
    rows_before = manifest_of(run, "prompts").rows_out
    assert rows_before == len(FINE) + len(EASY)
    for stage in DATA_STAGES[1:]:
        manifest = manifest_of(run, stage)
        failed, ids = failures_of(run, stage), {row["prompt_id"] for row in run.folder.child(stage).rows()}
        assert manifest.rows_in == rows_before, stage
        assert len(ids) + len(failed) + sum(manifest.filtered.values()) == rows_before, stage
        assert len(failed) == manifest.num_failed
        assert all(line["error"] and line["message"] for line in failed)
        rows_before = manifest.rows_out


def test_a_row_that_fits_no_window_fails_with_the_reason_where_that_is_known(run: Run) -> None:
    failed = failures_of(run, "proposals")
    assert {line["error"] for line in failed} == {"PromptTooLong"}
    assert len(failed) == 2, "a megabyte, and 10,000 turns"
    assert all("tokens" in line["message"] and len(line["message"]) <= 2_000 for line in failed)


def test_no_control_token_of_a_prompt_or_an_answer_reaches_the_training_set(run: Run, chatml_tokenizer: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    examples = run.folder.child("training_set").rows()
    assert len(examples) == 2 * (len(FINE) - 2 + len(EASY))
    for example in examples:
        turns = {"sft": 1, "aft": 2}[example["variant"]]
        assert example["input_ids"].count(start) == turns + 1, (
            "the turns of the prompt and the answer, and no injected one"
        )
        assert [label for label in example["labels"] if label == end] == [end]
    assert not any(MEGABYTE[:1000] in example["prompt_text"] for example in examples)


def test_the_card_counts_examples_removals_and_scores(run: Run) -> None:
    card = run.folder.child("training_set").read_bytes("card.md").decode()
    num_rows = len(FINE) - 2 + len(EASY)
    for words in (
        "licence of the prompts: CC BY 4.0",
        f"| prompts | {len(FINE) + len(BAD) + len(EASY)} | {len(FINE) + len(EASY)} | {len(BAD)} failed: InputError |",
        f"| proposals | {len(FINE) + len(EASY)} | {num_rows} | 2 failed: PromptTooLong |",
        f"| aft | train | {num_rows} |",
        f"| on-policy scripted, round 1 | {6 * num_rows} |",
        "| numeric, all | 30 | 0.200 | 0 / 0 / 0 / 0 / 0 / 1 / 1 |",
        "(empty answer)",
        "(no scorer)",
        "Tokens per target: ",
        "Candidates the verifier accepts: 6 of 18 (33.3%); targets it accepts: 6 of 6 (100.0%).",
    ):
        assert words in card, f"{words}\n\n{card}"
