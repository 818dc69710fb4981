"""A likelihood is the model's own log-probability of exactly the ids that training would use."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from templates.families import make_tokenizer

from aft_ray.config import (
    Config,
    EngineConfig,
    LikelihoodConfig,
    OpenAIEngineConfig,
    ScoresConfig,
    ScriptedEngineConfig,
    TransformersEngineConfig,
)
from aft_ray.data.likelihood import Likelihood
from aft_ray.data.scorers import build_scorer, scorer_settings
from aft_ray.data.scoring import Scored
from aft_ray.errors import ConfigError
from aft_ray.records import Message
from aft_ray.templates import ChatFormat, build_example

ROW: dict[str, Any] = {"prompt_id": "p-1", "messages": [{"role": "user", "content": "Hello there"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Llama with random weights and a ChatML tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,  # far from uniform, so that no two texts are equally likely
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def score(engine: EngineConfig, texts: list[str], row: dict[str, Any] = ROW, **settings: Any) -> Scored:
    config = ScoresConfig(scorer="likelihood", likelihood=LikelihoodConfig(**settings))

    async def work() -> Scored:
        return await build_scorer(config, engine).score(row, texts)

    return asyncio.run(work())


def by_hand(folder: Path, text: str) -> list[float]:
    """Return the log-probabilities of the labels of the training example, computed with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    chat, messages = ChatFormat.load(str(folder)), [Message(role="user", content="Hello there")]
    ids, labels = build_example(chat.prompt_ids(messages), chat.target_ids(messages, text))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(log_probs[i - 1, label]) for i, label in enumerate(labels) if label >= 0]


def test_the_score_is_the_log_probability_of_the_ids_that_training_uses(folder: Path) -> None:
    engine = TransformersEngineConfig(model=str(folder), dtype="float32")
    texts = ["Good day", "Hello there there there"]
    expected = [by_hand(folder, text) for text in texts]
    assert len(expected[0]) == 3  # two words and the end of the turn
    means = [sum(log_probs) / len(log_probs) for log_probs in expected]
    sums = [sum(log_probs) for log_probs in expected]
    assert [s.value for s in score(engine, texts).scores] == pytest.approx(means, abs=1e-4)
    assert [s.value for s in score(engine, texts, per_token=False).scores] == pytest.approx(sums, abs=1e-3)


def test_the_mean_does_not_favour_short_answers_and_the_sum_does(folder: Path) -> None:
    engine = ScriptedEngineConfig(tokenizer=str(folder))  # every token has log-probability -1
    texts = ["Good day", "Hello there there there"]
    assert [s.value for s in score(engine, texts).scores] == [-1.0, -1.0]
    assert [s.value for s in score(engine, texts, per_token=False).scores] == [-3.0, -5.0]


def test_the_tokens_that_were_read_are_counted(folder: Path) -> None:
    chat = ChatFormat.load(str(folder))
    num_prompt = len(chat.prompt_ids(ROW["messages"]))
    scored = score(ScriptedEngineConfig(tokenizer=str(folder)), ["Good day", "", "Hello"])
    assert (scored.prompt_tokens, scored.completion_tokens) == (2 * num_prompt + 3 + 2, 0)


def test_an_empty_text_and_a_text_that_does_not_fit_the_window_have_no_score(folder: Path) -> None:
    engine = ScriptedEngineConfig(tokenizer=str(folder), max_model_len=64)
    good, empty, long = score(engine, ["Good day", " \n", " there" * 60]).scores
    assert good.value == -1.0
    assert (empty.value, empty.reason) == (None, "empty answer")
    assert long.value is None
    assert long.reason is not None and "61 answer tokens do not fit the context window of 64" in long.reason


def test_a_conversation_that_the_chat_template_rejects_has_no_score(tmp_path: Path) -> None:
    make_tokenizer("mistral").save_pretrained(tmp_path)
    twice = {**ROW, "messages": [*ROW["messages"], *ROW["messages"]]}
    [refused] = score(ScriptedEngineConfig(tokenizer=str(tmp_path)), ["Good day"], twice).scores
    assert refused.value is None
    assert refused.reason is not None and "must alternate" in refused.reason


@pytest.mark.parametrize(
    "engine",
    [OpenAIEngineConfig(base_url="http://127.0.0.1:9/v1", model="far"), ScriptedEngineConfig()],
    ids=["endpoint", "scripted"],
)
def test_an_engine_that_takes_messages_is_rejected_before_the_first_request(engine: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"takes messages, not token ids.*scores\.likelihood\.engine"):
        Likelihood(LikelihoodConfig(), engine)


def test_an_engine_of_its_own_takes_precedence_over_the_runs(folder: Path) -> None:
    own = ScriptedEngineConfig(tokenizer=str(folder), max_model_len=77)
    config = ScoresConfig(scorer="likelihood", likelihood=LikelihoodConfig(engine=own))
    scorer = build_scorer(config, ScriptedEngineConfig(tokenizer=str(folder)))
    assert isinstance(scorer, Likelihood)
    assert scorer.engine.info.max_model_len == 77
    with pytest.raises(ConfigError, match=r"set scores\.likelihood\.engine to"):
        build_scorer(ScoresConfig(scorer="likelihood"))


def test_the_runs_model_is_in_the_fingerprint_only_if_it_makes_the_scores() -> None:
    def settings(scorer: str, model: str) -> dict[str, Any]:
        engine = {"type": "transformers", "model": model}
        raw = {"run": {"dir": "unused"}, "engine": engine, "scores": {"scorer": scorer}}
        return scorer_settings(Config.model_validate(raw))

    assert settings("likelihood", "one") != settings("likelihood", "two")
    assert settings("auto", "one") == settings("auto", "two")
