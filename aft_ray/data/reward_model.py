"""Scores answers with a sequence-classification reward model: its logit for the conversation that ends with the answer.

The model's own chat template formats the conversation, with the answer as the last assistant turn. A tokenizer without
a chat template gets the pair (last user turn, answer), the older convention of reward models. Nothing is truncated: an
answer that does not fit the context window has no score.

A worker processes several rows at once, but the model runs in a single thread, one batch at a time.

The constructor scores a good and an obviously bad answer to one question. A model that does not prefer the good answer
is rejected: it is not a reward model, or its checkpoint lacks the head.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aft_ray.cpu import dtype_to_load
from aft_ray.data.scoring import Row, Score, Scored, Scorer
from aft_ray.errors import ConfigError
from aft_ray.models import resolve_model
from aft_ray.records import Message
from aft_ray.templates.control import ControlTokens

logger = logging.getLogger(__name__)

SANITY_QUESTION: Message = {"role": "user", "content": "What is the capital of France?"}
SANITY_GOOD = "The capital of France is Paris."
SANITY_BAD = "Bananas bananas bananas. I will not tell you, go away."


class RewardModel(Scorer):
    """Loads the model in its constructor, on the GPU if there is one."""

    def __init__(self, reference: str, batch_size: int = 8, num_threads: int = 1) -> None:
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(num_threads)
        path = resolve_model(reference)
        self.reference = reference
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _load_classifier(path, reference, self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.control = ControlTokens.of(self.tokenizer, self.tokenizer.chat_template)
        self.pad_id = _padding_id(self.tokenizer)
        self.model.config.get_text_config().pad_token_id = self.pad_id
        self.batch_size = batch_size if self.pad_id is not None else 1
        self.max_length = _window(self.tokenizer, self.model.config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-model")
        self._check_sanity()

    def name_of(self, row: Row) -> str:
        return "reward_model"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._score_all, row, texts)
        return Scored(scores=scores)

    def _score_all(self, row: Row, texts: Sequence[str]) -> list[Score]:
        scores: list[Score] = [Score(value=None, reason="not scored")] * len(texts)
        encoded: dict[int, dict[str, list[int]]] = {}
        for n, text in enumerate(texts):
            try:
                inputs = self._encode(row["messages"], text)
            except Exception as error:  # chat templates are foreign code, and some reject a role
                scores[n] = _unscored(error)
                continue
            if len(inputs["input_ids"]) > self.max_length:
                reason = f"{len(inputs['input_ids'])} tokens > the reward model's context window {self.max_length}"
                scores[n] = Score(value=None, reason=reason)
            else:
                encoded[n] = inputs
        for part in _batches(encoded, self.batch_size):
            for n, score in zip(part, self._scores([encoded[n] for n in part]), strict=True):
                scores[n] = score
        return scores

    def _scores(self, encoded: Sequence[Mapping[str, list[int]]]) -> list[Score]:
        """Return one Score per input. A failed batch is retried one by one, so that one text cannot spoil the rest."""
        try:
            return [_finite(value) for value in self._logits(encoded)]
        except Exception as error:  # for example out of memory; the error becomes the reason
            if len(encoded) == 1:
                return [_unscored(error)]
            return [self._scores([inputs])[0] for inputs in encoded]

    def _encode(self, messages: Sequence[Mapping[str, str]], text: str) -> dict[str, list[int]]:
        turns = [{"role": m["role"], "content": self.control.neutralise(m["content"])} for m in messages]
        answer = self.control.neutralise(text)
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(turns[-1]["content"], answer, verbose=False))
        turns.append({"role": "assistant", "content": answer})
        return dict(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True))

    def _logits(self, encoded: Sequence[Mapping[str, list[int]]]) -> list[float]:
        import torch

        if len(encoded) == 1:
            batch = {key: torch.tensor([value]) for key, value in encoded[0].items()}
        else:
            batch = self.tokenizer.pad(list(encoded), return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**{key: value.to(self.device) for key, value in batch.items()}).logits
        return [float(value) for value in logits[:, 0].float()]

    def _check_sanity(self) -> None:
        good, bad = self._score_all({"messages": [SANITY_QUESTION]}, [SANITY_GOOD, SANITY_BAD])
        if good.value is None or bad.value is None or good.value <= bad.value:
            raise ConfigError(
                f"scores.reward_model {self.reference}: the score of {SANITY_GOOD!r} is {good.value} and that of "
                f"{SANITY_BAD!r} is {bad.value}; a reward model prefers the first. Check that this is a reward model"
            )
        logger.info("reward model %s: sanity pair %.3f > %.3f", self.reference, good.value, bad.value)


def _finite(value: float) -> Score:
    return Score(value=value) if math.isfinite(value) else Score(value=None, reason=f"the logit is {value}")


def _unscored(error: Exception) -> Score:
    logger.warning("reward model: %r", error)
    return Score(value=None, reason=f"{type(error).__name__}: {error}")


def _batches(items: Iterable[int], size: int) -> Iterator[list[int]]:
    rest = iter(items)
    while part := list(itertools.islice(rest, size)):
        yield part


def _load_classifier(path: str, reference: str, device: str) -> Any:
    """Load the classifier with its one logit. Raises ConfigError if the checkpoint has another head, or none."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=dtype_to_load("auto", device),
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
