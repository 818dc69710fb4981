"""Every step of a run with a tiny model and two workers: built, trained, served, asked, reported.

With LoRA the endpoint serves both adapters on one base model; fully trained models have an endpoint each.
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

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).parent.parent.parent


TRAINING = {
    "lora": {"num_workers": 2, "batch_size_per_worker": 2, "deepspeed": "zero2", "learning_rate": 2e-2},
    "full": {"num_workers": 1, "batch_size_per_worker": 4, "deepspeed": "none", "learning_rate": 1e-3},
}
NUM_EPOCHS = {"lora": 4, "full": 8}
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_every_step_of_a_run(method: str, tmp_path: Path) -> None:
    num_epochs = NUM_EPOCHS[method]
    num_steps = 4 * num_epochs
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
        "training": {**TRAINING[method], "method": method, "num_epochs": num_epochs, "eval_steps": num_steps // 2},
        "evaluation": {"plan": plan},
        "serving": {"plan": plan},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    report = run(tmp_path)
    assert [system["system"] for system in report["systems"]] == ["base", "sft", "aft"]
    by_condition = {one["name"]: one["perplexity"] for one in report["perplexities"]}
    measured = {"sft": by_condition["SFT, prompt only"], "aft": by_condition["AFT, prompt + proposals"]}
    for training in report["training"]:
        assert (tmp_path / "run" / "model" / training["variant"] / WEIGHTS[method]).is_file()
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


@pytest.mark.soak
def test_conversations_with_answers_go_through_every_step_that_they_need(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", window=1024)
    draw = random.Random(0)

    def turns() -> list[dict[str, str]]:
        question = {"role": "user", "content": " ".join(draw.choices(WORDS, k=9))}
        return [question, {"role": "assistant", "content": ANSWER}]

    rows = [{"messages": [*turns(), *turns()]} for _ in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"temperature": 1.0, "max_tokens": 8}
    plan = {"num_proposals": 2, "num_layers": 1, "proposal": short, "final": short}
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        "prompts": {"source": str(tmp_path / "rows.jsonl"), "held_out": 4},
        "training_set": {"source": "prompts", "answers": "all", "variants": ["sft_reference"], "max_length": 1024},
        "training": {**TRAINING["lora"], "num_epochs": 4, "eval_steps": 8},
        "evaluation": {"plan": plan},
        "serving": {"plan": plan},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    report = run(tmp_path)
    assert [system["system"] for system in report["systems"]] == ["base", "sft_reference"]
    assert report["perplexities"] == []
    [training] = report["training"]
    assert training["num_trained_tokens"] == 4 * 16 * 2 * (len(ANSWER.split()) + 1)
    (_, before), (_, after) = training["held_out"]["sft_reference"]
    assert after < before
    assert not (tmp_path / "run" / "proposals").exists()


def run(folder: Path) -> dict[str, Any]:
    """Run the command to its end and return what the report holds."""
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(folder / "run.yaml")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=1100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads((folder / "run" / "report" / "results.json").read_text())
    return results
