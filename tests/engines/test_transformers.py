"""The transformers engine on a tiny model: where answers end, whose settings decide, failing batches, counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aft_ray.config import TransformersEngineConfig
from aft_ray.engines import GenerateRequest, Sample, Sampling
from aft_ray.engines.transformers import Penalties, TransformersEngine
from aft_ray.errors import EngineError
from aft_ray.templates import ChatFormat
from tests.training.tiny import WORDS, write_model

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose pad token is not its eos token."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "Zebra"
    tokenizer.add_tokens(["abcdef"])  # transformers' stop strings need a tokenizer that can spell it
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(model: Path) -> TransformersEngine:
    return TransformersEngine(TransformersEngineConfig(model=str(model)))


def answer(runner: asyncio.Runner, engine: TransformersEngine, request: GenerateRequest) -> list[Sample]:
    async def samples() -> list[Sample]:
        found = [event async for event in engine.generate(request) if isinstance(event, Sample)]
        return sorted(found, key=lambda sample: sample.index)

    return runner.run(asyncio.wait_for(samples(), TIMEOUT_S))


def a_request(
    seeds: tuple[int, ...],
    *,
    adapter: Path | None = None,
    stop: tuple[str, ...] = (),
    stop_ids: tuple[int, ...] = (),
    temperature: float = 1.0,
) -> GenerateRequest:
    return GenerateRequest(
        stop_ids=stop_ids,
        request_id="test",
        prompt_ids=(8, 9, 10),
        messages=(),
        sampling=Sampling(max_tokens=48, stop=stop, temperature=temperature),
        seeds=seeds,
        adapter=None if adapter is None else str(adapter),
    )


def write_adapter(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder)
    return folder


def corrupt_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")


def unknown_type(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LORRA"'))


def another_rank(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 2'))


def test_scores_that_share_a_forward_pass_are_those_of_each_alone(
    engine: TransformersEngine, runner: asyncio.Runner, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    adapter, broken = (str(write_adapter(model, tmp_path / name)) for name in ("good", "broken"))
    corrupt_weights(Path(broken))
    asked = [
        (draw.choices(range(8, 24), k=draw.randint(1, 30)), draw.choices(range(8, 24), k=draw.randint(1, 9)), one)
        for one in (None, adapter, broken) * 4
    ]

    async def scores(apart: bool) -> list[Any]:
        tasks = []
        for one in asked:
            tasks.append(asyncio.create_task(engine.score(*one)))
            if apart:
                await asyncio.wait(tasks)
        return await asyncio.gather(*tasks, return_exceptions=True)

    passes: list[int] = []
    score = engine._score
    monkeypatch.setattr(engine, "_score", lambda batch: passes.append(len(batch)) or score(batch))
    alone, together = (runner.run(scores(apart)) for apart in (True, False))
    assert passes[:12] == [1] * 12 and max(passes[12:]) > 1
    for (_, continuation, one), expected, found in zip(asked, alone, together, strict=True):
        if one == broken:
            assert isinstance(expected, Exception) and isinstance(found, Exception)
        else:
            assert len(found) == len(continuation)
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("is_first", [True, False], ids=["first-adapter", "second-adapter"])
@pytest.mark.parametrize("damage", [corrupt_weights, unknown_type, another_rank])
def test_a_broken_adapter_is_an_engine_error_and_the_engine_answers_on(
    damage: Callable[[Path], None], is_first: bool, model: Path, runner: asyncio.Runner, tmp_path: Path
) -> None:
    engine = TransformersEngine(TransformersEngineConfig(model=str(model)))
    good, broken = write_adapter(model, tmp_path / "good"), write_adapter(model, tmp_path / "broken")
    damage(broken)
    alone = answer(runner, engine, a_request((1, 2)))
    if not is_first:
        answer(runner, engine, a_request((1,), adapter=good))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"transformers could not answer: \w+Error: "):
            answer(runner, engine, a_request((1, 2), adapter=broken))
    assert answer(runner, engine, a_request((1, 2))) == alone
    assert answer(runner, engine, a_request((1, 2), adapter=good)) != alone
    assert answer(runner, engine, a_request((1, 2))) == alone


def test_padding_behind_a_stop_string_does_not_count(engine: TransformersEngine, runner: asyncio.Runner) -> None:
    seeds = tuple(range(8))
    freely = answer(runner, engine, a_request(seeds))
    together = answer(runner, engine, a_request(seeds, stop=("bridge",)))
    alone = [answer(runner, engine, a_request((seed,), stop=("bridge",)))[0] for seed in seeds]
    assert [sample.token_ids for sample in together] == [sample.token_ids for sample in alone]
    stop_id = 8 + WORDS.index("bridge")
    stopped = [sample for sample in freely if stop_id in sample.token_ids]
    assert len({sample.token_ids.index(stop_id) for sample in stopped}) > 1
    for before in stopped:
        sample = together[before.index]
        assert sample.token_ids == before.token_ids[: before.token_ids.index(stop_id) + 1]
        assert sample.num_tokens == len(sample.token_ids)
        assert sample.finish_reason == "stop"


def test_an_answer_ends_where_its_format_ends_turns_though_the_model_would_go_on(
    tmp_path: Path, runner: asyncio.Runner
) -> None:
    """A base model with a chat template: its own eos is <|endoftext|>, what it was trained on ends in <|im_end|>."""
    folder = write_model(tmp_path, eos="<|endoftext|>")
    prompts = ChatFormat.load(str(folder))
    end = prompts.end_of_turn_id
    assert end is not None and end != prompts.tokenizer.eos_token_id
    engine = TransformersEngine(TransformersEngineConfig(model=str(folder)))
    seeds = tuple(range(8))
    freely = answer(runner, engine, a_request(seeds))
    ended = answer(runner, engine, a_request(seeds, stop_ids=prompts.stop_ids))
    passing = [sample for sample in freely if end in sample.token_ids[:-1]]
    assert passing, "no answer of this model passes the end of its turn, so this shows nothing"
    for before in passing:
        sample = ended[before.index]
        assert sample.token_ids == before.token_ids[: before.token_ids.index(end) + 1]
        assert (sample.finish_reason, sample.num_tokens) == ("stop", len(sample.token_ids))
        assert sample.text == prompts.tokenizer.decode(sample.token_ids[:-1], skip_special_tokens=True)


def test_a_stop_id_that_is_an_ordinary_word_is_not_in_the_text(
    engine: TransformersEngine, runner: asyncio.Runner
) -> None:
    stop_id = 8 + WORDS.index("bridge")
    samples = answer(runner, engine, a_request(tuple(range(8)), stop_ids=(stop_id,)))
    stopped = [sample for sample in samples if sample.token_ids[-1] == stop_id]
    assert stopped
    assert not any("bridge" in sample.text for sample in stopped)


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.8}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}],
    ids=lambda one: next(iter(one)),
)
def test_settings_of_the_models_own_generation_config_do_not_change_an_answer(
    settings: dict[str, float], model: Path, engine: TransformersEngine, runner: asyncio.Runner, tmp_path: Path
) -> None:
    own = AutoModelForCausalLM.from_pretrained(model)
    own.generation_config.update(**settings)
    own.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    assert next(iter(settings)) in (tmp_path / "generation_config.json").read_text()
    greedy = a_request((1,), temperature=0.0)
    found = answer(runner, TransformersEngine(TransformersEngineConfig(model=str(tmp_path))), greedy)
    assert found == answer(runner, engine, greedy)


def sampled(runner: asyncio.Runner, engine: TransformersEngine, **settings: object) -> Sample:
    request = a_request((1,), temperature=0)
    [sample] = answer(runner, engine, replace(request, sampling=replace(request.sampling, max_tokens=12, **settings)))
    return sample


def test_a_bias_makes_a_token_certain_or_impossible(runner: asyncio.Runner, engine: TransformersEngine) -> None:
    forced = sampled(runner, engine, logit_bias=((5, 100.0),))
    assert set(forced.token_ids) == {5}
    first = sampled(runner, engine).token_ids[0]
    assert first not in sampled(runner, engine, logit_bias=((first, -100.0),)).token_ids


def test_penalties_are_those_of_the_openai_api_and_count_the_answer_alone() -> None:
    import torch

    prompt, written = [1, 1], [3, 3, 4]
    processor = Penalties(Sampling(frequency_penalty=0.5, presence_penalty=0.25), width=len(prompt))
    changed = processor(torch.tensor([prompt + written]), torch.zeros(1, 6))
    assert changed.tolist() == [[0, 0, 0, -1.25, -0.75, 0]]


def test_a_frequency_penalty_changes_what_is_written(runner: asyncio.Runner, engine: TransformersEngine) -> None:
    bias = ((5, 31.0), (6, 30.0))
    plain, punished = (sampled(runner, engine, logit_bias=bias, frequency_penalty=p).token_ids for p in (0.0, 2.0))
    assert punished.count(5) < plain.count(5)


def test_a_repetition_penalty_divides_the_logits_of_what_is_there_already(
    runner: asyncio.Runner, engine: TransformersEngine
) -> None:
    plain = sampled(runner, engine, ignore_eos=True).token_ids
    punished = sampled(runner, engine, ignore_eos=True, repetition_penalty=10.0).token_ids
    assert len(set(punished)) > len(set(plain))


def test_an_answer_that_ignores_its_end_is_as_long_as_it_may_be(
    runner: asyncio.Runner, engine: TransformersEngine
) -> None:
    bias = ((engine.eos_ids[0], 100.0),)
    assert len(sampled(runner, engine, logit_bias=bias).token_ids) == 1
    ignoring = sampled(runner, engine, logit_bias=bias, ignore_eos=True)
    assert (len(ignoring.token_ids), ignoring.finish_reason) == (12, "length")


def test_it_computes_with_as_many_threads_as_its_setting_says(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    model = str(write_model(tmp_path))
    try:
        TransformersEngine(TransformersEngineConfig(model=model, num_threads=before + 1))
        assert torch.get_num_threads() == before + 1
        TransformersEngine(TransformersEngineConfig(model=model))
        assert torch.get_num_threads() == before + 1, "without a setting they are left as they are"
    finally:
        torch.set_num_threads(before)
