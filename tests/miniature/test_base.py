"""The miniature's base model: its tokenizer, its documents, and a pretraining of a few steps by the training room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aft_ray.config import load_config
from aft_ray.data.arithmetic import worked
from aft_ray.errors import AftError
from aft_ray.miniature.base import document_row, make_base, make_tokenizer
from aft_ray.templates import IGNORE, AggregatorTemplate, ChatFormat

ROOT = Path(__file__).parent.parent.parent
BASE = ROOT / "configs" / "miniature" / "base"
PAIRS = [(question, worked(question)) for question in ("07+08*13", "11-12*19")]


def test_the_stored_model_is_small_and_says_what_it_is() -> None:
    assert (BASE / "model.safetensors").stat().st_size < 3_000_000
    assert json.loads((BASE / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_conversation_has_the_ids_of_a_document() -> None:
    prompt_format = ChatFormat.load(str(BASE))
    turns = [("user", PAIRS[0][0]), ("assistant", PAIRS[0][1]), ("user", PAIRS[1][0])]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = (*prompt_format.prompt_ids(messages), *prompt_format.target_ids(messages, PAIRS[1][1]))  # type: ignore[arg-type]
    row = document_row("document-0", PAIRS, make_tokenizer())
    assert list(ids) == row["input_ids"]
    assert row["labels"] == [IGNORE, *row["input_ids"][1:]]


def test_an_aggregation_prompt_of_the_bare_template_has_no_unknown_token() -> None:
    prompt_format = ChatFormat.load(str(BASE))
    template = AggregatorTemplate.load("bare")
    messages = template.messages([{"role": "user", "content": "07+08*13"}], ["07,15,15", "07,15"])
    text = prompt_format.decode(prompt_format.prompt_ids(messages))
    assert text == "[1]07,15,15[2]07,15<|user|>07+08*13<|assistant|>"


@pytest.mark.soak
def test_a_base_model_is_pretrained_and_gets_its_chat_template(tmp_path: Path) -> None:
    settings = ["prompts.limit=40", "training.batch_size_per_worker=10", f"run.dir={tmp_path / 'run'}"]
    config = load_config(ROOT / "configs" / "miniature" / "base.yaml", settings)
    make_base(config, tmp_path / "base")
    assert ChatFormat.load(str(tmp_path / "base")).has_template
    metrics = (tmp_path / "run" / "checkpoints" / "documents" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    with pytest.raises(AftError, match="seed: was 1, is 2"):
        make_base(load_config(ROOT / "configs" / "miniature" / "base.yaml", [*settings, "run.seed=2"]), tmp_path / "b")
