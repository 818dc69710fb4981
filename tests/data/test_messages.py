"""A training set leaves the project as conversations: to a folder for other trainers, and to the hub."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from aft_ray.data.card import write_card
from aft_ray.data.messages import write_dataset
from aft_ray.data.training_set import format_to_train
from aft_ray.errors import ConfigError, InputError
from aft_ray.runs import RESOLVED, Run
from aft_ray.storage import Folder
from tests.command_line import aft_ray
from tests.data.test_kills import STAGES, run_in, work
from tests.hub import Hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer: str) -> Run:
    """A run with a finished training set: 24 prompts, some of which failed or were left out."""
    folder = tmp_path_factory.mktemp("messages") / "run"
    for name in ("prompts", *STAGES):
        work(folder, chatml_tokenizer, name)
    made = run_in(folder, chatml_tokenizer)
    write_card(made)
    return made


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_the_conversations_are_those_of_the_training_set(run: Run, tmp_path: Path, file_format: Any) -> None:
    counts = write_dataset(run, tmp_path / "data", file_format)
    examples = {row["example_id"]: row for row in run.folder.child("training_set").rows()}
    assert sum(counts.values()) == len(examples)
    assert set(counts) == {f"{v}/{s}.{file_format}" for v in ("sft", "aft", "joint") for s in ("train", "held_out")}
    chat = format_to_train(run.config.engine)
    seen = set()
    for name, count in counts.items():
        rows = datasets.load_dataset(
            file_format.replace("jsonl", "json"), data_files=str(tmp_path / "data" / name), split="train",
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        assert len(rows) == count
        for row in rows:
            *prompt, target = row["messages"]
            example = examples[row["example_id"]]
            assert f"{example['variant']}/{example['split']}.{file_format}" == name
            assert target == {"role": "assistant", "content": example["target_text"]}
            ids = [*chat.prompt_ids(prompt), *chat.target_ids(prompt, target["content"])]
            assert ids == list(example["input_ids"])
            seen.add(row["example_id"])
    assert seen == set(examples)


def test_the_card_has_the_head_that_the_hub_reads(run: Run, tmp_path: Path) -> None:
    config = run.config
    for number, (name, expected) in enumerate(
        [
            ("Apache 2.0", {"license": "apache-2.0"}),
            ("My own", {"license": "other", "license_name": "my-own"}),
            (None, {}),
        ]
    ):
        changed = config.model_copy(update={"prompts": config.prompts.model_copy(update={"license": name})})
        write_dataset(Run(changed, run.folder), tmp_path / str(number))
        _, head, body = (tmp_path / str(number) / "README.md").read_text().split("---\n", 2)
        found = yaml.safe_load(head)
        assert {key: value for key, value in found.items() if key.startswith("license")} == expected
        assert "# Training set of run" in body
    assert found["size_categories"] == ["n<1K"]
    assert found["configs"][0] == {
        "config_name": "aft",
        "data_files": [{"split": "test", "path": "aft/held_out.jsonl"}, {"split": "train", "path": "aft/train.jsonl"}],
    }
    loaded = datasets.load_dataset(str(tmp_path / "0"), "aft", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["messages", "example_id", "prompt_id"]
    info = json.loads((tmp_path / "0" / "dataset_info.json").read_text())
    assert info["aft_train"]["file_name"] == "aft/train.jsonl"


def test_what_is_not_there_and_what_is_in_the_way_is_said(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists: name another folder"):
        write_dataset(run, tmp_path / "taken")
    with pytest.raises(InputError, match="training_set: not finished"):
        write_dataset(Run(run.config, Folder.at(tmp_path / "empty")), tmp_path / "out")


def test_the_command_writes_the_folder(run: Run, tmp_path: Path) -> None:
    done = aft_ray("dataset", "--config", f"{run.folder.location}/{RESOLVED}", "--output", str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/data/aft/train.jsonl: " in done.stdout


def push(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    return aft_ray("push", "me/mine", "--config", f"{run.folder.location}/{RESOLVED}", *arguments)


@pytest.mark.parametrize("repo", ["nope", "/nope", "me/", "me/mine/more", "https://huggingface.co/me/mine"])
def test_a_name_without_an_owner_is_refused_before_anything_is_read(repo: str) -> None:
    done = aft_ray("push", repo, "--config", "no/such/config.yaml", "--what", "adapter")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{repo}: expected OWNER/NAME, such as me/" in done.stderr


def test_a_training_set_is_pushed_to_the_hub_and_a_dry_run_only_says_so(run: Run, hub: Hub, tmp_path: Path) -> None:
    dry = push(run, "--what", "dataset", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "aft/train.jsonl" in dry.stdout
    assert f"8 files would go to {hub.url}/datasets/me/mine (public if it is new)" in dry.stdout
    assert not hub.created and not hub.files
    done = push(run, "--what", "dataset", "--private")
    assert done.returncode == 0, done.stderr
    [repo] = hub.created
    assert (repo["name"], repo["type"]) == ("mine", "dataset")
    assert repo.get("private") or repo.get("visibility") == "private"
    write_dataset(run, tmp_path / "data")
    paths = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    written = {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in paths}
    assert hub.files == {"datasets/me/mine": written}
    assert hub.messages == ["Training set of run"]


def test_a_hub_that_refuses_is_one_sentence(run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = push(run, "--what", "dataset")
    assert refused.returncode == 2
    [sentence] = refused.stderr.strip().splitlines()
    assert f"{hub.url}/datasets/me/mine: the hub refused the upload: " in sentence and "401" in sentence
    assert not hub.files


def test_an_adapter_is_pushed_only_if_one_is_trained(run: Run, hub: Hub) -> None:
    missing = push(run, "--what", "adapter")
    assert missing.returncode == 2 and "nothing is trained yet" in missing.stderr
    assert not hub.created
