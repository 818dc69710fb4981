"""Every step of a run with a tiny model and two workers: built, trained, served, asked, reported.

With LoRA the endpoint serves both adapters on one base model; a fully trained model has an endpoint of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import ANSWER, WORDS, write_model

from aft_ray.storage import Folder
from tests.command_line import aft_ray

ROOT = Path(__file__).parent.parent.parent


def test_every_step_of_a_run(tmp_path: Path) -> None:
    num_epochs, num_steps = 4, 16
    model = write_model(tmp_path / "model", window=1024)
    draw = random.Random(0)
    prompts = [{"prompt": " ".join(draw.choices(WORDS, k=9)), "reference": ANSWER} for _ in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    short = {"temperature": 1.0, "max_tokens": 8}
    plan = {"num_proposals": 2, "num_layers": 1, "proposal": short, "final": short}
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 4},
        "proposals": {"num_per_prompt": 2, "sampling": short},
        "scores": {"scorer": "length"},
        "selection": {"num_proposals": 2},
        "targets": {"source": "reference"},
        "training_set": {"max_length": 1024},
        "training": {
            "num_workers": 2,
            "batch_size_per_worker": 2,
            "deepspeed": "zero2",
            "learning_rate": 2e-2,
            "num_epochs": num_epochs,
            "eval_steps": num_steps // 2,
        },
        "evaluation": {"plan": plan},
        "serving": {"plan": plan},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    report = run(tmp_path)
    assert [system["system"] for system in report["systems"]] == ["base", "sft", "aft"]
    by_condition = {one["name"]: one["perplexity"] for one in report["perplexities"]}
    measured = {"sft": by_condition["SFT, prompt only"], "aft": by_condition["AFT, prompt + proposals"]}
    for training in report["training"]:
        assert (tmp_path / "run" / "model" / training["variant"] / "adapter_model.safetensors").is_file()
        assert training["num_trained_tokens"] == num_epochs * 16 * (len(ANSWER.split()) + 1)
        curves = training["held_out"]
        assert set(curves) == {"sft", "aft"}
        steps, perplexities = zip(*curves[training["variant"]], strict=True)
        assert steps == (num_steps // 2, num_steps)
        assert perplexities[-1] < perplexities[0]
        # the model that was served for the evaluation is the one whose training ended here
        assert measured[training["variant"]] == pytest.approx(perplexities[-1], rel=1e-2)
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "held-out perplexity, aft in training" in page
    refused = aft_ray("evaluate", "--config", str(tmp_path / "run.yaml"), "--set", "training.num_epochs=9")
    assert refused.returncode == 4
    assert "checkpoints/sft was made from other settings:\n  training.num_epochs: was 4" in refused.stderr


@pytest.mark.soak
def test_a_model_is_fully_trained_on_conversations_and_takes_every_step_that_they_need(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", window=1024)
    draw = random.Random(0)

    def turns() -> list[dict[str, str]]:
        question = {"role": "user", "content": " ".join(draw.choices(WORDS, k=9))}
        return [question, {"role": "assistant", "content": ANSWER}]

    rows = [{"messages": [*turns(), *turns()]} for _ in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"temperature": 0.0, "max_tokens": 8}
    plan = {"num_proposals": 2, "num_layers": 1, "proposal": short, "final": short}
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        "prompts": {"source": str(tmp_path / "rows.jsonl"), "held_out": 4},
        "training_set": {"source": "prompts", "answers": "all", "variants": ["sft_reference"], "max_length": 1024},
        "training": {
            "method": "full",
            "batch_size_per_worker": 4,
            "deepspeed": "none",
            "learning_rate": 1e-3,
            "num_epochs": 8,
            "eval_steps": 16,
        },
        "evaluation": {"plan": plan},
        "serving": {"plan": plan},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    report = run(tmp_path)
    assert [system["system"] for system in report["systems"]] == ["base", "sft_reference"]
    assert report["perplexities"] == []
    [training] = report["training"]
    assert (tmp_path / "run" / "model" / "sft_reference" / "model.safetensors").is_file()
    assert training["num_trained_tokens"] == 8 * 16 * 2 * (len(ANSWER.split()) + 1)
    (_, before), (_, after) = training["held_out"]["sft_reference"]
    assert after < before
    drafts = {system: drafts_of(tmp_path / "run", system) for system in ("base", "sft_reference")}
    assert all(draft.startswith("theoldbridge") for draft in drafts["sft_reference"]), "its own endpoint serves it"
    assert not any(draft.startswith("theoldbridge") for draft in drafts["base"])
    assert not (tmp_path / "run" / "proposals").exists()


def drafts_of(run: Path, system: str) -> list[str]:
    """Return the first layer of all answers of a system."""
    rows = Folder.at(run / "evaluation" / system / "answers").rows()
    return [draft["text"] for row in rows for draft in row["layers"][0]]


def run(folder: Path) -> dict[str, Any]:
    """Run the command to its end and return what the report holds."""
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(folder / "run.yaml")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=1150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads((folder / "run" / "report" / "results.json").read_text())
    return results
