"""What local engines promise: transformers with a tiny model, and both with the real SmolLM2-135M-Instruct.

The tests share one engine of each kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import TransformersEngineConfig, VllmEngineConfig
from aft_ray.engines import Engine, GenerateRequest, Sample, Sampling, TokenDelta, build_engine
from aft_ray.engines.base import ToolUse, whole_calls
from aft_ray.engines.vllm import VllmEngine
from aft_ray.errors import EngineDead, EngineError, InvalidSchema
from aft_ray.models import resolve_model
from aft_ray.templates.loading import load_format
from tests.training.tiny import write_model

MODEL = "smollm2-135m-instruct"
QUESTION = (
    {"role": "system", "content": "You are a patient gardener who answers in one short and friendly sentence."},
    {"role": "user", "content": "My tomato plants have yellow leaves at the bottom. What should I look at first?"},
)


class Bench:
    """An engine, its event loop, its model's folder and its chat format."""

    def __init__(self, kind: str, model: Path) -> None:
        self.runner, self.model, self.is_tiny = asyncio.Runner(), model, kind == "tiny"
        config = (
            # float32: in bfloat16 a batch of another size may round to other tokens, on some processors
            VllmEngineConfig(
                model=str(model),
                max_model_len=512,
                dtype="float32",
                max_num_seqs=16,
                max_lora_rank=8,
                tool_parser="hermes",
            )
            if kind == "vllm"
            else TransformersEngineConfig(
                model=str(model), max_model_len=512, dtype="float32" if self.is_tiny else "auto"
            )
        )
        self.engine: Engine = self.run(self._build(config))
        self.format = load_format(self.engine.info)
        self.ids = tuple(self.format.prompt_ids(QUESTION))

    async def _build(self, config: Any) -> Engine:
        return build_engine(config)

    def run(self, work: Awaitable[Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 300))

    def request(self, seeds: tuple[int, ...], *, stream: bool = False, **sampling: Any) -> GenerateRequest:
        return GenerateRequest(
            request_id="test",
            prompt_ids=self.ids,
            messages=QUESTION,
            sampling=Sampling(**{"temperature": 1.0, "top_k": 50, "max_tokens": 24} | sampling),
            seeds=seeds,
            stream=stream,
        )

    async def samples(self, request: GenerateRequest) -> list[Sample]:
        events = [event async for event in self.engine.generate(request)]
        return sorted((e for e in events if isinstance(e, Sample)), key=lambda sample: sample.index)


REAL = (pytest.mark.model, pytest.mark.soak)


@pytest.fixture(scope="module", params=["tiny", *(pytest.param(kind, marks=REAL) for kind in ("transformers", "vllm"))])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    is_tiny = request.param == "tiny"
    model = write_model(tmp_path_factory.mktemp("model"), window=1024) if is_tiny else resolve_model(MODEL)
    bench = Bench(request.param, Path(model))
    yield bench
    bench.run(bench.engine.close())
    bench.runner.close()


def test_samples_carry_text_ids_counts_and_finish_reason(bench: Bench) -> None:
    samples = bench.run(bench.samples(bench.request((1, 2, 3))))
    assert [s.index for s in samples] == [0, 1, 2]
    for sample in samples:
        assert sample.num_prompt_tokens == len(bench.ids)
        assert sample.num_tokens == len(sample.token_ids) > 0
        assert sample.finish_reason in {"stop", "length"}
        assert (sample.num_tokens == 24) or sample.finish_reason == "stop"
        assert "<|im_end|>" not in sample.text
        assert bench.format.decode(sample.token_ids[:5]).strip()[:8] in sample.text


def test_equal_seeds_give_equal_text_and_different_seeds_do_not(bench: Bench) -> None:
    first = bench.run(bench.samples(bench.request((11, 12, 13, 14))))
    again = bench.run(bench.samples(bench.request((14, 12))))
    assert len({s.text for s in first}) == 4
    assert [s.seed for s in first] == [11, 12, 13, 14]
    assert again[1].text == first[1].text
    assert again[0].text == first[3].text


def test_greedy_ignores_the_seed(bench: Bench) -> None:
    one, two = bench.run(bench.samples(bench.request((1, 2), temperature=0.0)))
    assert one.text == two.text
    assert one.seed is None


def test_streamed_pieces_add_up_to_the_sample(bench: Bench) -> None:
    async def collect() -> tuple[str, Sample]:
        text, sample = "", None
        async for event in bench.engine.generate(bench.request((5,), stream=True)):
            if isinstance(event, TokenDelta):
                text += event.text
            else:
                sample = event
        assert sample is not None
        return text, sample

    text, sample = bench.run(collect())
    assert text == sample.text


def test_a_stop_string_ends_the_sample_before_it(bench: Bench) -> None:
    if "abc" not in bench.format.decode(bench.format.tokenizer("abc").input_ids):
        pytest.skip("transformers' stop strings need a tokenizer that can spell; test_transformers.py has one")
    (whole,) = bench.run(bench.samples(bench.request((7,), temperature=0.0)))
    word = bench.format.decode(whole.token_ids[3:4]).strip()
    (cut,) = bench.run(bench.samples(bench.request((7,), temperature=0.0, stop=(word,))))
    assert cut.finish_reason == "stop"
    assert word not in cut.text
    assert whole.text.startswith(cut.text.rstrip())


def test_scores_are_log_probabilities_that_prefer_the_models_own_answer(bench: Bench) -> None:
    (own,) = bench.run(bench.samples(bench.request((1,), temperature=0.0)))
    score: Callable[..., Any] = bench.engine.score
    likely = bench.run(score(bench.ids, own.token_ids))
    unlikely = bench.run(score(bench.ids, tuple(reversed(own.token_ids))))
    assert len(likely) == len(own.token_ids)
    assert all(value <= 0 for value in likely)
    assert sum(likely) > sum(unlikely)


def test_a_samples_log_probabilities_are_its_scores(bench: Bench) -> None:
    if not bench.engine.info.gives_logprobs:
        pytest.skip("this engine tells no log-probabilities; the endpoint refuses to be asked for them")
    request = dataclasses.replace(bench.request((3,), top_k=0), top_logprobs=2)
    for stream in (False, True):
        [sample] = bench.run(bench.samples(dataclasses.replace(request, stream=stream)))
        scores = bench.run(bench.engine.score(bench.ids, sample.token_ids))
        assert [token.logprob for token in sample.logprobs] == pytest.approx(scores, abs=0.2)  # bf16, other batches
        assert all(len(token.top) == 2 for token in sample.logprobs)
        assert all(token.top[0][1] >= max(token.logprob, token.top[1][1]) for token in sample.logprobs)
        assert "".join(token.token for token in sample.logprobs).startswith(sample.text[:20])


def test_the_log_probabilities_of_a_prompt_are_its_scores(bench: Bench) -> None:
    if not bench.engine.info.gives_prompt_logprobs:
        pytest.skip("the engine gives none")
    request = dataclasses.replace(bench.request((1,), max_tokens=1), prompt_logprobs=1)
    [sample] = bench.run(bench.samples(request))
    first, *rest = sample.prompt_logprobs
    scores = bench.run(bench.engine.score(bench.ids[:1], bench.ids[1:]))
    assert math.isnan(first.logprob)
    assert [token.logprob for token in rest] == pytest.approx(scores, abs=1e-4)
    assert all(len(token.top) == 1 and token.top[0][1] >= token.logprob - 1e-6 for token in rest)
    assert "".join(token.token for token in rest).startswith("system")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_tool_that_must_be_called_is_called(bench: Bench, stream: bool) -> None:
    if not bench.engine.info.calls_tools:
        pytest.skip("the engine has no parser of tool calls")
    parameters = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
    tool = {
        "type": "function",
        "function": {"name": "water", "description": "Waters plants.", "parameters": parameters},
    }
    request = dataclasses.replace(
        bench.request((1,), stream=stream, temperature=0, max_tokens=64),
        tool_use=ToolUse(tools=(tool,), choice="required", is_parallel=False),
    )

    async def events() -> list[TokenDelta | Sample]:
        return [event async for event in bench.engine.generate(request)]

    found = bench.run(events())
    [call] = found[-1].tool_calls
    assert call.name == "water" and call.id
    assert isinstance(json.loads(call.arguments)["count"], int)
    assert "<tool_call>" not in found[-1].text
    if stream:
        pieces = [piece for event in found[:-1] for piece in event.tool_calls]
        assert whole_calls(pieces) == (call,)


def test_an_answer_holds_to_its_json_schema(bench: Bench) -> None:
    if not bench.engine.info.follows_json_schema:
        pytest.skip("this engine holds to no schema; the endpoint refuses to be asked for one")
    properties = {"organ": {"enum": ["leaf", "root"]}, "water": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    request = dataclasses.replace(bench.request((1, 2, 3), max_tokens=60), json_schema=json.dumps(schema))
    for sample in bench.run(bench.samples(request)):
        answer = json.loads(sample.text)
        assert set(answer) == {"organ", "water"}
        assert answer["organ"] in {"leaf", "root"} and isinstance(answer["water"], bool)


def test_an_invalid_schema_is_the_callers_error_and_the_engine_answers_on(bench: Bench) -> None:
    if not bench.engine.info.follows_json_schema:
        pytest.skip("this engine holds to no schema; the endpoint refuses to be asked for one")
    request = bench.request((1,))
    for schema in ('{"type": "no such type"}', '{"type": "object", "properties": 7}'):
        with pytest.raises(InvalidSchema, match="no engine can follow this schema"):
            bench.run(bench.samples(dataclasses.replace(request, json_schema=schema)))
    assert bench.run(bench.samples(request))[0].text


def test_closing_the_generator_aborts_and_the_engine_answers_on(bench: Bench) -> None:
    async def close_early() -> float:
        async with contextlib.aclosing(
            bench.engine.generate(bench.request((1,), stream=True, max_tokens=400))
        ) as events:
            async for _ in events:
                break
        start = time.monotonic()
        await bench.samples(bench.request((2,), max_tokens=2))
        return time.monotonic() - start

    assert bench.run(close_early()) < 30


def test_a_sample_that_vllm_gives_up_is_a_failed_one_without_a_text(bench: Bench) -> None:
    if not isinstance(bench.engine, VllmEngine):
        pytest.skip("only vLLM ends answers by itself")
    core = bench.engine._engine

    async def abort_early() -> Sample:
        async for event in bench.engine.generate(bench.request((1,), stream=True, max_tokens=400, ignore_eos=True)):
            if isinstance(event, Sample):
                return event
            await core.abort(list(core.output_processor.request_states), internal=True)
        raise AssertionError("no sample came")

    sample = bench.run(abort_early())
    assert (sample.text, sample.finish_reason) == ("", "error")
    assert "finish reason 'abort'" in str(sample.error)
    assert 0 < sample.num_tokens < 400


def test_a_missing_adapter_is_an_engine_error_that_names_the_folder(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"/no/such/adapter.*adapter_config\.json"):
        bench.run(bench.engine.score(bench.ids, (1, 2), adapter="/no/such/adapter"))


def write_adapters(folder: Path, model: Path, alpha: int = 8) -> tuple[str, str]:
    """Save two LoRA adapters with random weights through peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = (str(folder / "one"), str(folder / "two"))
    for seed, adapter in enumerate(folders, start=1):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), lora)
        adapted.save_pretrained(adapter)
    return folders


@pytest.fixture(scope="module")
def adapters(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    alpha = 64 if bench.is_tiny else 8  # the layers of a tiny model add little
    return write_adapters(tmp_path_factory.mktemp("adapters"), bench.model, alpha)


def test_adapters_are_told_apart_by_path_and_leave_the_base_model_alone(
    bench: Bench, adapters: tuple[str, str]
) -> None:
    answer = tuple(bench.format.target_ids(QUESTION, "Look at the watering first."))
    base, first, second, first_again, base_again = (
        sum(bench.run(bench.engine.score(bench.ids, answer, adapter=adapter)))
        for adapter in (None, adapters[0], adapters[1], adapters[0], None)
    )
    assert (first_again, base_again) == (pytest.approx(first, rel=0.01), pytest.approx(base, rel=0.01))
    for adapter, found in zip(adapters, (first, second), strict=True):
        assert found == pytest.approx(plain_score(bench.model, adapter, bench.ids, answer), rel=0.03)
    assert len({round(value) for value in (base, first, second)}) == 3

    async def together() -> list[list[float]]:
        scores = (bench.engine.score(bench.ids, answer, adapter=adapter) for adapter in (None, *adapters) * 2)
        return await asyncio.gather(*scores)

    expected = [base, first, second] * 2
    assert [sum(one) for one in bench.run(together())] == [pytest.approx(value, rel=0.01) for value in expected]
    request = dataclasses.replace(bench.request((1,), temperature=0.0), adapter=adapters[0])
    (sample,) = bench.run(bench.samples(request))
    (plain,) = bench.run(bench.samples(bench.request((1,), temperature=0.0)))
    assert sample.text != plain.text


def rank_sixteen(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))


def dora(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def cut_off(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_another_model(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros(3, 5) for name in tensors}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("damage", [rank_sixteen, dora, cut_off, of_another_model])
def test_an_adapter_that_cannot_be_loaded_fails_its_own_caller_only(
    bench: Bench, adapters: tuple[str, str], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    if isinstance(bench.engine.config, TransformersEngineConfig):  # type: ignore[attr-defined]
        pytest.skip("tests/engines/test_transformers.py has its own list of what breaks an adapter")
    bad = tmp_path / "bad"
    shutil.copytree(adapters[0], bad)
    damage(bad)

    async def beside_each_other() -> list[Any]:
        request = bench.request((1, 2), max_tokens=16)
        refused = dataclasses.replace(request, request_id="bad", adapter=str(bad))
        return await asyncio.gather(*map(bench.samples, (request, refused, request)), return_exceptions=True)

    for _ in range(2):
        first, refused, last = bench.run(beside_each_other())
        assert isinstance(refused, EngineError) and not isinstance(refused, EngineDead), refused
        assert str(bad) in str(refused)
        assert all(sample.error is None and sample.text for sample in [*first, *last])
    bench.run(bench.engine.check())
    shutil.rmtree(bad)
    shutil.copytree(adapters[0], bad)
    good = dataclasses.replace(bench.request((1,)), adapter=str(bad))
    assert bench.run(bench.samples(good))[0].text, "a folder that was mended is tried again"


def test_an_answer_ends_at_a_stop_id_that_is_not_in_its_text(bench: Bench) -> None:
    (whole,) = bench.run(bench.samples(bench.request((7,), temperature=0.0)))
    stop_id = whole.token_ids[3]
    request = dataclasses.replace(bench.request((7,), temperature=0.0), stop_ids=(stop_id,))
    (cut,) = bench.run(bench.samples(request))
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop_id) + 1]
    assert cut.finish_reason == "stop"
    assert cut.text == bench.format.decode(cut.token_ids[:-1])


def plain_score(model: Path, adapter: str, prompt_ids: tuple[int, ...], answer_ids: tuple[int, ...]) -> float:
    """Return the log-probability of an answer by peft alone, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.inference_mode():
        logprobs = torch.log_softmax(lora(input_ids=ids).logits[0, :-1], dim=-1)
    own = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
    return float(own[len(prompt_ids) - 1 :].sum())


def test_samples_of_one_prompt_share_its_prefill(bench: Bench) -> None:
    words = [{"role": "user", "content": "A prompt nobody has asked yet: " + " ".join(f"item {i}," for i in range(60))}]
    ids = tuple(bench.format.prompt_ids(words))
    request = bench.request((1, 2, 3, 4), max_tokens=2)
    samples = bench.run(bench.samples(GenerateRequest(**{**request.__dict__, "prompt_ids": ids})))
    cached = sorted(sample.num_cached_tokens for sample in samples)
    assert cached[0] == 0, "someone has to compute the prompt"
    assert cached[1] >= len(ids) - 64, "the other three read what the first one computed"


@pytest.mark.model
@pytest.mark.soak
def test_a_padded_batch_answers_as_each_prompt_alone(smollm2: Path) -> None:
    """In float32, padding, the shared prefill and the batch do not change the text at all."""
    import torch

    async def work() -> None:
        engine = build_engine(TransformersEngineConfig(model=MODEL, dtype="float32"))
        prompt_format = load_format(engine.info)
        texts = ("Name three rivers.", "What is the capital of France, and why is it famous around the world?")
        requests = [
            GenerateRequest(
                request_id=text,
                prompt_ids=tuple(prompt_format.prompt_ids([{"role": "user", "content": text}])),
                messages=(),
                sampling=Sampling(temperature=0, max_tokens=16),
                seeds=(0, 1),
            )
            for text in texts
        ]

        async def answers(request: GenerateRequest) -> list[list[int]]:
            return [list(e.token_ids) async for e in engine.generate(request) if isinstance(e, Sample)]

        together = await asyncio.gather(*map(answers, requests))
        for request, found in zip(requests, together, strict=True):
            ids = torch.tensor([request.prompt_ids])
            alone = engine.model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)  # type: ignore[attr-defined]
            assert found == [alone[0, ids.shape[1] :].tolist()] * 2

    asyncio.run(work())


KILLED_OWNER = """
import asyncio, os
from aft_ray.config import VllmEngineConfig
from aft_ray.engines import build_engine
async def main():
    engine = build_engine(VllmEngineConfig(model="smollm2-135m-instruct", max_model_len=128, max_lora_rank=0))
    print("ready", flush=True)
    await asyncio.sleep(600)
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.model
@pytest.mark.soak
def test_a_killed_owner_leaves_no_engine_process_behind(tmp_path: Path, smollm2: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(KILLED_OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert owner.stdout is not None
        assert any(line.strip() == "ready" for line in owner.stdout), "the engine did not start"
        assert _session_of(owner.pid) - {owner.pid}, "the engine runs in a process of its own"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        deadline = time.monotonic() + 60
        while (left := _session_of(owner.pid)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left
    finally:
        for pid in _session_of(owner.pid):
            os.kill(pid, signal.SIGKILL)


def _session_of(leader: int) -> set[int]:
    """Return the living processes of the session that `leader` started, without zombies."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    found.add(int(entry.name))
    return found


@pytest.mark.model
@pytest.mark.soak
def test_every_request_to_an_engine_whose_core_was_killed_ends_as_dead(smollm2: Path, tmp_path: Path) -> None:
    """Running requests, an adapter that is just being loaded, and everything that comes later."""
    import psutil

    adapter, _ = write_adapters(tmp_path, smollm2)

    async def work() -> None:
        before = set(psutil.Process().children(recursive=True))
        engine = build_engine(VllmEngineConfig(model=MODEL, max_model_len=512, max_num_seqs=8, max_lora_rank=8))
        cores = [p for p in psutil.Process().children(recursive=True) if p not in before and "EngineCore" in p.name()]
        assert len(cores) == 1
        request = GenerateRequest(
            request_id="long", prompt_ids=(1, 2, 3), messages=(), sampling=Sampling(max_tokens=400), seeds=(1, 2)
        )

        async def all_events() -> list[Any]:
            return [event async for event in engine.generate(request)]

        running = asyncio.create_task(all_events())
        await asyncio.sleep(2)
        assert not running.done()
        cores[0].suspend()
        loading = asyncio.create_task(engine.score((1, 2), (3,), adapter=adapter))
        await asyncio.sleep(0.5)
        cores[0].kill()
        for task in (running, loading):
            with pytest.raises(EngineDead):
                await asyncio.wait_for(task, 60)
        with pytest.raises(EngineDead):
            await all_events()
        with pytest.raises(EngineDead):
            await engine.check()
        await engine.close()

    asyncio.run(work())


def write_phi3(folder: Path) -> tuple[Path, Path]:
    """Write a small Phi-3, whose projections are fused, and an adapter on all of its linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3Config, Phi3ForCausalLM

    model_folder = write_model(folder / "model", hidden_size=128)
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=26,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        pad_token_id=2,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model = Phi3ForCausalLM(config)
    model.save_pretrained(model_folder)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return model_folder, folder / "adapter"


@pytest.mark.model
@pytest.mark.soak
def test_an_adapter_on_fused_layers_scores_as_under_peft_and_speculation_changes_no_greedy_token(
    tmp_path: Path,
) -> None:
    model, adapter = write_phi3(tmp_path)
    prompt, answer = (8, 9, 10, 11, 8, 9, 10), (11, 12, 13, 9)

    async def work() -> None:
        config = VllmEngineConfig(
            model=str(model), max_model_len=128, dtype="float32", max_num_seqs=8, speculation="ngram"
        )
        engine = build_engine(config, adapters=[str(adapter)])
        base = sum(await engine.score(prompt, answer))
        adapted = sum(await engine.score(prompt, answer, str(adapter)))
        assert adapted == pytest.approx(plain_score(model, str(adapter), prompt, answer), rel=0.01)
        assert abs(base - adapted) > 0.5
        greedy = Sampling(temperature=0, max_tokens=16)
        request = GenerateRequest(request_id="copy", prompt_ids=prompt, messages=(), sampling=greedy, seeds=(0,))
        (sample,) = [event async for event in engine.generate(request) if isinstance(event, Sample)]
        assert list(sample.token_ids) == plain_answer(model, prompt, 16)
        await engine.close()

    asyncio.run(work())


def plain_answer(model: Path, prompt_ids: tuple[int, ...], max_tokens: int) -> list[int]:
    """Return the greedy answer of transformers alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([prompt_ids])
    made = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return made[0, len(prompt_ids) :].tolist()
