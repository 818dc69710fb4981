"""What only a GPU can show (`make test-gpu`). With AFT_RAY_GPU_CHECK=cpu the tests run on a CPU, as a rehearsal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from aft_ray.config import VllmEngineConfig
from aft_ray.engines import Engine, GenerateRequest, Sample, Sampling, build_engine
from aft_ray.errors import EngineDead
from aft_ray.templates.loading import load_format

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not ON_GPU and os.environ.get("AFT_RAY_GPU_CHECK") != "cpu", reason="no GPU (make test-gpu)"),
]

MODEL = "smollm2-135m-instruct"
QUESTION = ({"role": "user", "content": "What does a tomato plant need most in a hot summer?"},)


def run(work: Awaitable[Any]) -> Any:
    async def in_time() -> Any:
        return await asyncio.wait_for(work, 180)

    return asyncio.run(in_time())


def engine_with(share: float) -> Engine:
    return build_engine(
        VllmEngineConfig(model=MODEL, max_model_len=512, gpu_memory_utilization=share, cpu_kv_cache_gib=0.5)
    )


async def answer(engine: Engine, seed: int = 1) -> str:
    ids = load_format(engine.info).prompt_ids(QUESTION)
    request = GenerateRequest(
        request_id=f"question-{seed}",
        prompt_ids=ids,
        messages=QUESTION,
        sampling=Sampling(temperature=0.0, max_tokens=16),
        seeds=(seed,),
    )
    (sample,) = [event async for event in engine.generate(request) if isinstance(event, Sample)]
    return sample.text


def memory_in_use() -> int:
    """Bytes of the first GPU that any process holds."""
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free)


def test_two_engines_share_one_gpu_and_the_memory_of_a_closed_one_is_free(smollm2: Path) -> None:
    async def both() -> None:
        first, second = engine_with(0.3), engine_with(0.3)
        one, two = await asyncio.gather(answer(first), answer(second))
        assert one == two
        before = memory_in_use() if ON_GPU else 0
        await first.close()
        assert await answer(second) == one
        if ON_GPU:
            assert memory_in_use() < before - 0.2 * torch.cuda.get_device_properties(0).total_memory
        await second.close()

    run(both())


def test_the_death_of_the_engine_core_is_told_from_other_errors(smollm2: Path) -> None:
    async def killed() -> None:
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        engine = engine_with(0.4)
        assert await answer(engine)
        for process in psutil.Process().children(recursive=True):
            if process.pid not in before and "EngineCore" in " ".join(process.cmdline()):
                process.kill()
        with pytest.raises(EngineDead):
            await answer(engine, seed=2)
        with pytest.raises(EngineDead):
            await engine.check()
        await engine.close()

    run(killed())


def save_reward_model(folder: Path, tokenizer_of: Path) -> Any:
    """Save a random classifier that prefers the good answer of the start's check, and return it in float32."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from aft_ray.data.reward_model import SANITY_BAD, SANITY_GOOD, SANITY_QUESTION

    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # not the end of a text, so that it scores in batches
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        initializer_range=0.1,
    )
    config.num_labels = 1
    model = LlamaForSequenceClassification(config).eval()
    good, bad = (logit(model, tokenizer, (SANITY_QUESTION,), answer) for answer in (SANITY_GOOD, SANITY_BAD))
    if good < bad:
        model.score.weight.data.neg_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def logit(model: Any, tokenizer: Any, conversation: Sequence[Any], answer: str) -> float:
    turns = [*conversation, {"role": "assistant", "content": answer}]
    inputs = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        return float(model(**inputs).logits[0, 0])


def test_a_reward_model_scores_as_in_float32_on_a_cpu(smollm2: Path, tmp_path: Path) -> None:
    from aft_ray.data.reward_model import RewardModel

    plain = save_reward_model(tmp_path / "model", smollm2)
    scorer = RewardModel(str(tmp_path / "model"))
    texts = [f"Answer number {n}: " + "water and light " * (n % 7 + 1) for n in range(8)]
    row = {"prompt_id": "p-1", "messages": list(QUESTION), "task": None, "reference": None}
    found = [score.value for score in run(scorer.score(row, texts)).scores]
    expected = [logit(plain, scorer.tokenizer, QUESTION, text) for text in texts]
    assert scorer.device == ("cuda" if ON_GPU else "cpu")
    assert found == pytest.approx(expected, abs=0.2 if ON_GPU else 1e-3)  # bfloat16 on a GPU
