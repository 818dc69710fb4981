"""Scores answers with a sequence-classification reward model: its logit for the conversation that ends with the answer.

The model's own chat template formats the conversation, with the answer as the last assistant turn. A tokenizer without
a chat template gets the pair (last user turn, answer), the older convention of reward models. Nothing is truncated: an
answer that does not fit the context window has no score.

A worker scores many rows at once, and the texts of all of them share batches of similar length (`batches`). The model
computes in bfloat16 on a GPU and in float32 on a CPU.

Before anything else it scores a good and an obviously bad answer to one question. A model that does not prefer the good
answer is rejected: it is not a reward model, or its checkpoint lacks the head.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aft_ray.data.scoring import Row, Score, Scored, Scorer
from aft_ray.errors import ConfigError
from aft_ray.gpus import take_assigned_gpus
from aft_ray.models import resolve_model
from aft_ray.records import Message
from aft_ray.templates.control import ControlTokens

logger = logging.getLogger(__name__)

SANITY_QUESTION: Message = {"role": "user", "content": "What is the capital of France?"}
SANITY_GOOD = "The capital of France is Paris."
SANITY_BAD = "Bananas bananas bananas. I will not tell you, go away."
SANITY_ROW = {"messages": [SANITY_QUESTION]}
SANITY_TEXTS = (SANITY_GOOD, SANITY_BAD)

Encoded = Mapping[str, list[int]]
"""What a tokenizer makes of one text: `input_ids` and the masks that belong to them."""


class _Formatter:
    """Turns conversations that end with an answer into the token ids that a reward model reads."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.control = ControlTokens.of(self.tokenizer, self.tokenizer.chat_template)

    def encode_all(self, row: Row, texts: Sequence[str], max_length: int) -> list[Encoded | Score]:
        """Return the ids of each text, or a Score with the reason why the model cannot read it."""
        return [self._encode_or_reason(row, text, max_length) for text in texts]

    def _encode_or_reason(self, row: Row, text: str, max_length: int) -> Encoded | Score:
        try:
            inputs = self.encode(row["messages"], text)
        except Exception as error:  # chat templates are foreign code, and some reject a role
            return _unscored(error)
        num_tokens = len(inputs["input_ids"])
        if num_tokens > max_length:
            reason = f"{num_tokens} tokens > the reward model's context window {max_length}"
            return Score(value=None, reason=reason)
        return inputs

    def encode(self, messages: Sequence[Mapping[str, str]], text: str) -> dict[str, list[int]]:
        turns = [{"role": m["role"], "content": self.control.neutralise(m["content"])} for m in messages]
        answer = self.control.neutralise(text)
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(turns[-1]["content"], answer, verbose=False))
        turns.append({"role": "assistant", "content": answer})
        return dict(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True))


class RewardModel(Scorer):
    """The model in transformers. The constructor loads it, on the GPU if there is one."""

    def __init__(self, reference: str, batch_tokens: int = 16384, num_threads: int = 1) -> None:
        import torch

        take_assigned_gpus()
        torch.set_num_threads(num_threads)
        path = resolve_model(reference)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _load_classifier(path, reference, self.device)
        self.formatter = _Formatter(path)
        self.tokenizer = self.formatter.tokenizer
        self.pad_id = _padding_id(self.tokenizer)
        self.model.config.get_text_config().pad_token_id = self.pad_id
        self.batch_tokens = batch_tokens if self.pad_id is not None else 0
        self.max_length = _window(self.tokenizer, self.model.config)
        self.num_batches = 0
        """Number of forward passes so far."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-model")
        self._waiting: list[tuple[Encoded, asyncio.Future[Score]]] = []
        self._work: asyncio.Task[None] | None = None
        encoded = self.formatter.encode_all(SANITY_ROW, SANITY_TEXTS, self.max_length)
        _check_sanity(reference, [one if isinstance(one, Score) else self._scores([one])[0] for one in encoded])

    def name_of(self, row: Row) -> str:
        return "reward_model"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._thread, self.formatter.encode_all, row, texts, self.max_length)
        futures: list[Score | asyncio.Future[Score]] = []
        for one in encoded:
            if isinstance(one, Score):
                futures.append(one)
                continue
            future: asyncio.Future[Score] = loop.create_future()
            self._waiting.append((one, future))
            futures.append(future)
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._score_waiting())
        return Scored(
            scores=[one if isinstance(one, Score) else await one for one in futures],
            prompt_tokens=_num_tokens(encoded),
        )

    async def _score_waiting(self) -> None:
        """Score what waits, batch by batch, until nothing does. What comes meanwhile waits for the next round."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            waiting, self._waiting = sorted(self._waiting, key=lambda item: len(item[0]["input_ids"])), []
            for part in batches([len(inputs["input_ids"]) for inputs, _ in waiting], self.batch_tokens):
                inputs = [waiting[place][0] for place in part]
                scores = await loop.run_in_executor(self._thread, self._scores, inputs)
                for place, score in zip(part, scores, strict=True):
                    if not waiting[place][1].done():  # its row may have been cancelled
                        waiting[place][1].set_result(score)

    def _scores(self, encoded: Sequence[Encoded]) -> list[Score]:
        """Return one Score per input. A failed batch is retried one by one, so that one text cannot spoil the rest."""
        try:
            return [_finite(value) for value in self._logits(encoded)]
        except Exception as error:  # for example out of memory; the error becomes the reason
            if len(encoded) == 1:
                return [_unscored(error)]
            return [self._scores([inputs])[0] for inputs in encoded]

    def _logits(self, encoded: Sequence[Encoded]) -> list[float]:
        import torch

        self.num_batches += 1
        if len(encoded) == 1:
            batch = {key: torch.tensor([value]) for key, value in encoded[0].items()}
        else:
            batch = self.tokenizer.pad(list(encoded), return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**{key: value.to(self.device) for key, value in batch.items()}).logits
        return [float(value) for value in logits[:, 0].float()]

    async def close(self) -> None:
        self._thread.shutdown()


class VllmRewardModel(Scorer):
    """The same on vLLM's pooling runner, which batches by itself. The first call checks the model."""

    def __init__(self, reference: str, tensor_parallel_size: int = 1) -> None:
        from aft_ray.engines.vllm_classifier import VllmClassifier

        path = resolve_model(reference)
        self.reference = reference
        self.formatter = _Formatter(path)
        self.classifier = VllmClassifier(path, tensor_parallel_size)
        self._sanity: asyncio.Task[None] | None = None

    def name_of(self, row: Row) -> str:
        return "reward_model"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        if self._sanity is None:
            self._sanity = asyncio.create_task(self._check())
        await asyncio.shield(self._sanity)
        return await self._score(row, texts)

    async def _check(self) -> None:
        _check_sanity(self.reference, (await self._score(SANITY_ROW, SANITY_TEXTS)).scores)

    async def _score(self, row: Row, texts: Sequence[str]) -> Scored:
        encoded = self.formatter.encode_all(row, texts, self.classifier.max_model_len)
        scores = await asyncio.gather(*map(self._one, encoded))
        return Scored(scores=scores, prompt_tokens=_num_tokens(encoded))

    async def _one(self, encoded: Encoded | Score) -> Score:
        if isinstance(encoded, Score):
            return encoded
        return _finite(await self.classifier.logit(encoded["input_ids"]))

    async def check(self) -> None:
        await self.classifier.check()

    async def close(self) -> None:
        await self.classifier.close()


def _num_tokens(encoded: Sequence[Encoded | Score]) -> int:
    return sum(len(one["input_ids"]) for one in encoded if not isinstance(one, Score))


def _check_sanity(reference: str, scores: Sequence[Score]) -> None:
    good, bad = scores
    if good.value is None or bad.value is None or good.value <= bad.value:
        raise ConfigError(
            f"scores.reward_model {reference}: the score of {SANITY_GOOD!r} is {good.value} and that of "
            f"{SANITY_BAD!r} is {bad.value}; a reward model prefers the first. Check that this is a reward model"
        )
    logger.info("reward model %s: sanity pair %.3f > %.3f", reference, good.value, bad.value)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the places of texts of ascending `lengths` in batches of at most `batch_tokens` tokens, padding included.

    A text that is longer than that is a batch of its own.

    >>> list(batches([2, 2, 3, 9, 20], batch_tokens=10))
    [[0, 1, 2], [3], [4]]
    """
    part: list[int] = []
    for place, length in enumerate(lengths):
        if part and length * (len(part) + 1) > batch_tokens:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def _finite(value: float) -> Score:
    return Score(value=value) if math.isfinite(value) else Score(value=None, reason=f"the logit is {value}")


def _unscored(error: Exception) -> Score:
    logger.warning("reward model: %r", error)
    return Score(value=None, reason=f"{type(error).__name__}: {error}")


def _load_classifier(path: str, reference: str, device: str) -> Any:
    """Load the classifier with its one logit. Raises ConfigError if the checkpoint has another head, or none."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype="bfloat16" if device == "cuda" else "float32",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"scores.reward_model {reference}: cannot be loaded: {error}") from None
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise ConfigError(
            f"scores.reward_model {reference}: not in the checkpoint, or of another shape: {', '.join(missing[:4])}. "
            "Expected a sequence-classification model with one label"
        )
    return model.to(device).eval()


def _padding_id(tokenizer: Any) -> int | None:
    """Return the padding token, or None if it is missing or equals the EOS token; texts are then scored one by one.

    Decoder classifiers read the logit at the last token that is not padding, so the EOS token must not count as
    padding.
    """
    pad_id = tokenizer.pad_token_id
    return None if pad_id is None or pad_id == tokenizer.eos_token_id else int(pad_id)


def _window(tokenizer: Any, config: Any) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(tokenizer.model_max_length, positions))
