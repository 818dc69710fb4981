"""`transformers.generate` behind the `Engine` protocol: it starts in a second and runs wherever torch runs.

Samples that arrive together and ask for the same sampling and adapter are generated in one left-padded batch of up to
`max_batch_size`, in a thread. The samples of one prompt share its prefill. Each sample draws from its own seeded
generator, so its text does not depend on the rest of the batch. A batch ends when its longest sample ends: use vLLM for
long runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.config import TransformersEngineConfig
from aft_ray.cpu import dtype_to_load
from aft_ray.engines.adapter_file import adapter_folder
from aft_ray.engines.base import EXTRAS, EngineEvent, EngineInfo, GenerateRequest, Sample, Sampling, TokenDelta
from aft_ray.errors import EngineError
from aft_ray.models import resolve_model

logger = logging.getLogger(__name__)

BATCH_WINDOW_S = 0.05
"""Requests that arrive within this time share a batch. It is short beside the seconds that a batch takes."""
MAX_SCORED = 2**26
"""Logits, or pairs of tokens in an attention mask, up to which scores share a forward pass: 256 MB in float32."""


@dataclass(eq=False)
class _Job:
    """One sample that waits for its batch."""

    request: GenerateRequest
    index: int
    done: asyncio.Future[Sample]
    cancelled: bool = False

    @property
    def kind(self) -> tuple[Sampling, tuple[int, ...], str | None]:
        return self.request.sampling, self.request.stop_ids, self.request.adapter


@dataclass(eq=False)
class _ScoreJob:
    """One continuation that waits for its log-probabilities."""

    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    adapter: str | None
    scores: list[float] | None = None


class TransformersEngine:
    """One model in this process, with any number of LoRA adapters."""

    def __init__(self, config: TransformersEngineConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self.config = config
        self.model_path = resolve_model(config.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            self.model_path,
            dtype=dtype_to_load(config.dtype, self.device),
            trust_remote_code=config.trust_remote_code,
            device_map=self.device,
        )
        self.model.eval()
        self.eos_ids = _as_ids(self.model.generation_config.eos_token_id)
        # `generate` takes what a request leaves open from here, such as a model's own repetition_penalty or num_beams
        self.model.generation_config = GenerationConfig()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model_path, trust_remote_code=config.trust_remote_code)
        self._adapters: dict[str, str] = {}
        self._waiting: list[_Job] = []
        self._to_score: list[_ScoreJob] = []
        self._runner: asyncio.Task[None] | None = None
        self._model_lock = asyncio.Lock()

    @property
    def info(self) -> EngineInfo:
        own = int(getattr(self.model.config, "max_position_embeddings", 4096))
        max_model_len = min(own, self.config.max_model_len or own)
        return EngineInfo(
            model=self.config.model,
            tokenizer=self.config.model,
            max_model_len=max_model_len,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
            honours=EXTRAS,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        loop = asyncio.get_running_loop()
        jobs = [_Job(request, index, loop.create_future()) for index in range(len(request.seeds))]
        self._waiting.extend(jobs)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_batches())
        try:
            for next_done in asyncio.as_completed([job.done for job in jobs]):
                sample = await next_done
                if request.stream and sample.text:
                    yield TokenDelta(index=sample.index, text=sample.text, num_tokens=sample.num_tokens)
                yield sample
        finally:
            for job in jobs:
                job.cancelled = True
                job.done.cancel()

    async def _run_batches(self) -> None:
        while self._waiting:
            await asyncio.sleep(BATCH_WINDOW_S)
            batch = self._next_batch()
            if not batch:
                continue
            for job in batch:
                job.request.count(job.index, 0)
            try:
                async with self._model_lock:
                    samples = await asyncio.to_thread(self._generate_batch, batch)
            except Exception as error:  # process boundary: whatever the libraries raise, the readers get it as a reason
                logger.exception("generation of a batch of %d failed", len(batch))
                reason = f"transformers could not answer: {type(error).__name__}: {error}"
                for job in batch:
                    if not job.done.done():
                        job.done.set_exception(EngineError(reason))
                continue
            for job, sample in zip(batch, samples, strict=True):
                if not job.done.done():
                    job.done.set_result(sample)

    def _next_batch(self) -> list[_Job]:
        """Take the oldest waiting sample, and those after it that ask for the same sampling and adapter."""
        self._waiting = [job for job in self._waiting if not job.cancelled]
        if not self._waiting:
            return []
        kind = self._waiting[0].kind
        alike = [job for job in self._waiting if job.kind == kind][: self.config.max_batch_size]
        chosen = set(map(id, alike))
        self._waiting = [job for job in self._waiting if id(job) not in chosen]
        return alike

    def _generate_batch(self, batch: Sequence[_Job]) -> list[Sample]:
        import torch

        sampling, stop_ids, adapter = batch[0].kind
        self._use_adapter(adapter)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        places: dict[tuple[int, ...], int] = {}
        prompt_of = torch.tensor(
            [places.setdefault(job.request.prompt_ids, len(places)) for job in batch], device=self.device
        )
        ids, mask = _left_padded(list(places), pad, self.device)
        width = ids.shape[1]
        output = self.model.generate(
            input_ids=ids[prompt_of],
            attention_mask=mask[prompt_of],
            past_key_values=self._prefill(ids, mask, prompt_of, sampling.max_tokens),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # the processor below leaves one candidate: the one its seed drew
            repetition_penalty=sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
            sequence_bias={(token,): bias for token, bias in sampling.logit_bias} or None,
            logits_processor=[
                Penalties(sampling, width),
                _SeededSampler(sampling, [job.request.seeds[job.index] for job in batch], self.device),
            ],
            stopping_criteria=[_AllCancelled(batch)],
            stop_strings=list(sampling.stop) or None,
            tokenizer=self.tokenizer if sampling.stop else None,
            eos_token_id=None if sampling.ignore_eos else [*self.eos_ids, *stop_ids] or None,
            pad_token_id=pad,
        )
        first_of = {job.request.prompt_ids: row for row, job in reversed(list(enumerate(batch)))}
        return [
            self._sample(job, output[row, width:].tolist(), pad, shared=first_of[job.request.prompt_ids] != row)
            for row, job in enumerate(batch)
        ]

    def _prefill(self, ids: Any, mask: Any, prompt_of: Any, max_tokens: int) -> Any:
        """Return the key-value cache of each sample's prompt, with room for its answer.

        Every distinct prompt is computed once.
        """
        import torch

        if ids.shape[1] < 2:
            return None
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.inference_mode():
            cache = self.model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
            cache.reorder_cache(prompt_of)
        cache.layers = [layer_with_room(layer, max_tokens) for layer in cache.layers]
        return cache

    def _sample(self, job: _Job, ids: list[int], pad: int, *, shared: bool) -> Sample:
        """Return the sample of one row. `generate` pads the rows that end before the longest one."""
        sampling = job.request.sampling
        ends = set[int]() if sampling.ignore_eos else {*self.eos_ids, *job.request.stop_ids}
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        finish_reason = "length" if end is None else "stop"
        kept = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        found = [position for stop in sampling.stop if (position := text.find(stop)) >= 0]
        if found:  # the row ended here, so that what follows is padding, also where the pad token is an eos token
            text, finish_reason = text[: min(found)], "stop"
            while kept and kept[-1] == pad:
                kept = kept[:-1]
        return Sample(
            index=job.index,
            text=text,
            token_ids=tuple(kept),
            finish_reason=finish_reason,
            num_prompt_tokens=len(job.request.prompt_ids),
            num_tokens=len(kept),
            num_cached_tokens=len(job.request.prompt_ids) - 1 if shared else 0,
            seed=job.request.seeds[job.index] if sampling.temperature > 0 else None,
        )

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        """See `Engine.score`. Who gets the model first scores what the others wait for too."""
        job = _ScoreJob(tuple(prompt_ids), tuple(continuation_ids), adapter)
        self._to_score.append(job)
        try:
            async with self._model_lock:
                if job.scores is None:
                    batch = self._next_to_score(job)
                    scores = await asyncio.to_thread(self._score, batch)
                    for one, found in zip(batch, scores, strict=True):
                        one.scores = found
        finally:
            self._to_score.remove(job)
        assert job.scores is not None
        return job.scores

    def _next_to_score(self, job: _ScoreJob) -> list[_ScoreJob]:
        """Return the job and those that can share its forward pass, as far as there is memory for it."""
        alike = [one for one in self._to_score if one.scores is None and one.adapter == job.adapter and one is not job]
        batch = [job]
        for one in alike:
            larger = [*batch, one]
            num_scored = max(len(other.continuation_ids) for other in larger) + 1
            width = max(len(other.prompt_ids) + len(other.continuation_ids) for other in larger)
            if len(larger) * max(num_scored * len(self.tokenizer), width * width) > MAX_SCORED:
                break
            batch = larger
        return batch

    def _score(self, batch: Sequence[_ScoreJob]) -> list[list[float]]:
        import torch

        self._use_adapter(batch[0].adapter)
        ids, mask = _left_padded([job.prompt_ids + job.continuation_ids for job in batch], 0, self.device)
        longest = max(len(job.continuation_ids) for job in batch)
        with torch.inference_mode():
            # only the positions that predict the continuations go through the head
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                logits_to_keep=longest + 1,
            ).logits[:, :-1]
            scores = []
            for row, job in enumerate(batch):
                num_tokens = len(job.continuation_ids)
                logprobs = torch.log_softmax(logits[row, longest - num_tokens :].float(), dim=-1)
                wanted = torch.tensor(job.continuation_ids, device=self.device)
                scores.append(logprobs.gather(1, wanted[:, None]).squeeze(1).tolist())
        return scores

    def _use_adapter(self, adapter: str | None) -> None:
        """Answer with this adapter from now on, or with the base model when it is None.

        This uses peft, because transformers' own `load_adapter` logs every adapter that was loaded before as missing
        from the new checkpoint (transformers 5.23).
        """
        if adapter is None:
            if self._adapters:
                self.model.base_model.disable_adapter_layers()
            return
        if adapter not in self._adapters:
            self._load_adapter(adapter, f"adapter-{len(self._adapters)}")
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._adapters[adapter])

    def _load_adapter(self, adapter: str, name: str) -> None:
        """Load an adapter beside those that are loaded. One that cannot be loaded leaves the model as it was."""
        from peft import PeftConfig, get_peft_model

        folder = adapter_folder(adapter)
        if not (folder / "adapter_config.json").is_file():
            raise EngineError(f"adapter {adapter}: no adapter_config.json in that folder")
        if not self._adapters:
            self.model = get_peft_model(self.model, PeftConfig.from_pretrained(str(folder)), adapter_name=name)
        try:
            self.model.load_adapter(str(folder), adapter_name=name)
        except Exception:  # raised again, whatever it is: the model must be as it was
            if self._adapters:
                self.model.delete_adapter(name)
            else:
                self.model = self.model.unload()
            raise
        self.model.eval()
        self._adapters[adapter] = name

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
        del self.model


def _left_padded(prompts: Sequence[tuple[int, ...]], pad: int, device: str) -> tuple[Any, Any]:
    """Return (ids, attention mask), both of shape [prompts, longest prompt]."""
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def layer_with_room(layer: Any, num_tokens: int) -> Any:
    """Return a layer of a key-value cache that takes that many more tokens without copying those it has.

    transformers' own layer copies all of them for every token that comes: more than half of the decoding time of a
    model of a million parameters. Layers of other kinds, such as sliding windows, are returned as they are.
    """
    from transformers.cache_utils import DynamicLayer

    class LayerWithRoom(DynamicLayer):
        def __init__(self) -> None:
            super().__init__()
            self.lazy_initialization(layer.keys, layer.values)
            self.buffers = [_lengthened(layer.keys, num_tokens + 1), _lengthened(layer.values, num_tokens + 1)]
            self._show(layer.keys.shape[-2])

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            begin = self.get_seq_length()
            end = begin + key_states.shape[-2]
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, begin:end] = states
            self._show(end)
            return self.keys, self.values

        def _show(self, length: int) -> None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    return LayerWithRoom() if type(layer) is DynamicLayer else layer


def _lengthened(states: Any, num_tokens: int) -> Any:
    """Return states [rows, heads, tokens, width] with room for more tokens behind."""
    batch, heads, length, width = states.shape
    longer = states.new_empty((batch, heads, length + num_tokens, width))
    longer[:, :, :length] = states
    return longer


def _as_ids(setting: int | list[int] | None) -> list[int]:
    return setting if isinstance(setting, list) else [] if setting is None else [setting]


class _AllCancelled:
    """A stopping criterion that counts tokens, and ends a batch when nobody waits for any of its samples.

    A sample that ended before the others of its batch goes on being counted until it is reported, because its row goes
    on being computed.
    """

    def __init__(self, batch: Sequence[_Job]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        gone = [job.cancelled for job in self.batch]
        for job in self.batch:
            if not job.cancelled:
                job.request.count(job.index, 1)
        return torch.full((len(gone),), all(gone), dtype=torch.bool, device=input_ids.device)


class Penalties:
    """A logits processor of the penalties for tokens that an answer has already, as the OpenAI API defines them."""

    def __init__(self, sampling: Sampling, width: int) -> None:
        self.sampling = sampling
        self.width = width
        """Number of tokens before the answer."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        frequency, presence = self.sampling.frequency_penalty, self.sampling.presence_penalty
        if frequency == presence == 0:
            return scores
        written = input_ids[:, self.width :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - frequency * counts - presence * (counts > 0)


class _SeededSampler:
    """A logits processor that draws the tokens of each row from numbers that only its own seed decides.

    `generate` itself samples all rows from one global generator, so a sample would depend on the rest of its batch. All
    numbers of a row are drawn at the start: a generator that is asked at every token costs a small model half its time.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: str) -> None:
        import torch

        self.sampling = sampling
        self.position = 0
        draws = [torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.draws = torch.stack(draws).to(device)
        """Shape [rows, max_tokens], from 0 to 1."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        if self.sampling.temperature == 0:
            return scores
        # top-k first: everything after it is then k wide instead of the whole vocabulary
        width = min(self.sampling.top_k or scores.shape[1], scores.shape[1])
        values, tokens = torch.topk(scores.float() / self.sampling.temperature, width)
        probabilities = torch.softmax(values, dim=-1)
        if self.sampling.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.sampling.top_p, 0)
        if self.sampling.min_p > 0:
            floor = self.sampling.min_p * probabilities[:, :1]
            probabilities = probabilities.masked_fill(probabilities < floor, 0)
        sums = probabilities.cumsum(dim=-1)
        drawn = self.draws[:, self.position, None] * sums[:, -1:]
        self.position += 1
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # the likelier tokens come first
        pick = torch.minimum((sums <= drawn).sum(dim=-1, keepdim=True), last)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens.gather(1, pick), 0)
