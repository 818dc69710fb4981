"""Conversations with answers are trained on without proposals: from the file to ids and labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from aft_ray.config import load_config
from aft_ray.data.proposals import data_stages
from aft_ray.errors import ConfigError
from aft_ray.pipeline.needs import needs
from aft_ray.storage import Folder
from aft_ray.templates import answer_spans
from tests.command_line import aft_ray

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome."},
    {"role": "user", "content": "And of row {row}?"},
    {"role": "assistant", "content": "Row {row} has none."},
]


def conversations(num_rows: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{**turn, "content": turn["content"].replace("{row}", str(row))} for turn in TALK]}
        for row in range(num_rows)
    ]


def write_run(folder: Path, tokenizer: str, answers: str, suffix: str) -> Path:
    source = folder / f"rows.{suffix}"
    rows = conversations(6)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "run": {"dir": str(folder / "run")},
        "engine": {"type": "scripted", "tokenizer": tokenizer},
        "prompts": {"source": str(source), "held_out": 2},
        "training_set": {"source": "prompts", "answers": answers, "variants": ["sft_reference"]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


@pytest.mark.parametrize(("answers", "suffix"), [("all", "jsonl"), ("last", "parquet")])
def test_rows_go_from_the_file_to_the_training_set_without_the_stages_between(
    answers: str, suffix: str, ray_cluster: None, chatml_tokenizer: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    config = write_run(tmp_path, chatml_tokenizer, answers, suffix)
    done = aft_ray("run", "--config", str(config), "--until", "training_set")
    assert done.returncode == 0, done.stderr
    run = Folder.at(tmp_path / "run")
    assert {"prompts", "training_set"} == set(run.folder_names())
    rows = run.child("training_set").rows()
    assert sorted(row["split"] for row in rows) == ["held_out"] * 2 + ["train"] * 4
    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer)
    for row in rows:
        number = tokenizer.decode(row["input_ids"]).partition("And of row ")[2][0]
        learnt = [tokenizer.decode(row["input_ids"][start:end]) for start, end in answer_spans(row["labels"])]
        assert learnt == ["Rome.<|im_end|>"] * (answers == "all") + [f"Row {number} has none.<|im_end|>"]
    card = run.child("training_set").read_bytes("card.md").decode()
    assert f"- answers: those of the prompts, {answers} in the loss" in card
    assert "## Targets" not in card
    assert "sft_reference" in aft_ray("preview", "-n", "2", "--config", str(config)).stdout


def test_nothing_is_asked_for_the_stages_that_do_not_run(tmp_path: Path, chatml_tokenizer: str) -> None:
    config = load_config(write_run(tmp_path, chatml_tokenizer, "last", "jsonl"))
    assert data_stages(config) == ["prompts", "training_set"]
    assert [need.step for need in needs(config)] == ["training_set", "train", "evaluate"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training_set.variants=[sft,aft]", "Set variants to [sft_reference], or source to targets"),
        ("training_set.source=targets", "training_set.answers all: only the last answer is a target here"),
    ],
)
def test_what_needs_the_stages_that_do_not_run_is_refused(
    setting: str, words: str, tmp_path: Path, chatml_tokenizer: str
) -> None:
    config = write_run(tmp_path, chatml_tokenizer, "all", "jsonl")
    with pytest.raises(ConfigError) as refused:
        load_config(config, [setting])
    assert words in str(refused.value)


def test_rows_without_an_answer_are_refused_when_they_are_read(
    ray_cluster: None, tmp_path: Path, chatml_tokenizer: str
) -> None:
    config = write_run(tmp_path, chatml_tokenizer, "last", "jsonl")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {n}"}) + "\n" for n in range(6)))
    done = aft_ray("run", "--config", str(config), "--until", "training_set")
    assert done.returncode == 2
    assert "training_set.source prompts needs the reference answers of the prompts, and 6 of 6 have none" in done.stderr
