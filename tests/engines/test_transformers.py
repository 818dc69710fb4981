"""The transformers engine on a tiny model: what it does when a batch fails, and how it counts tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from aft_ray.config import TransformersEngineConfig
from aft_ray.engines import GenerateRequest, Sample, Sampling
from aft_ray.engines.transformers import TransformersEngine
from aft_ray.errors import EngineError
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


def a_request(seeds: tuple[int, ...], *, adapter: Path | None = None, stop: tuple[str, ...] = ()) -> GenerateRequest:
    return GenerateRequest(
        request_id="test",
        prompt_ids=(8, 9, 10),
        messages=(),
        sampling=Sampling(max_tokens=48, stop=stop),
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
