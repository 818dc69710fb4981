"""What a propose-and-aggregate run tells, in order. Batch inference reads to the end, Serve streams, evaluation keeps.

ProposalDone*  LayerDone  ProposalDone*  LayerDone  ...  AnswerDelta*  Finished
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aft_ray.engines.base import TokenLogprob
from aft_ray.records import Message


@dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """Tokens of one layer, failed and cancelled answers included."""

    layer: int
    prompt_tokens: int = 0
    """Prompt tokens sent, counted once per answer."""
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`, those the engine did not have to compute again."""
    num_answers: int = 0
    """Answers that ended by themselves and were not empty."""
    num_failed: int = 0
    """Failed or empty answers."""
    num_cancelled: int = 0
    """Stragglers cancelled by the draft deadline, and second copies (`hedge_s`) that came too late."""
    seconds: float = 0.0
    decided_by: Literal["model", "vote", "agreement"] = "model"
    """`vote`: the last layer counted the answers below. `agreement`: they were all equal, so nothing was asked."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of a layer: a proposal (layer 0), an aggregation (hidden layers), or the final answer (layer L)."""

    layer: int
    index: int
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int = 0
    seed: int | None = None
    error: str | None = None
    inputs: tuple[int, ...] = ()
    """Indices of the answers of the layer below that it was shown, in the order shown. Of a final answer that was not
    written but voted or agreed on: those of the last layer written that gave it."""
    length_action: str | None = None
    """What the length policy did to its inputs, such as `drop_longest: dropped 2`; None when everything fitted."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of a final answer's tokens, where asked for."""


@dataclass(frozen=True, kw_only=True)
class ProposalDone:
    """An answer below the last layer is done (or failed: `answer.error`)."""

    answer: Answer


@dataclass(frozen=True, kw_only=True)
class LayerDone:
    """Every answer of a layer below the last is done, failed or cancelled."""

    usage: LayerUsage


@dataclass(frozen=True, kw_only=True)
class AnswerDelta:
    """A piece of the final answer, as it is made. One that was voted or agreed on is a single piece of 0 new tokens."""

    text: str
    num_tokens: int
    index: int = 0
    """Which of the final answers it belongs to."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The whole run."""

    answer: Answer
    layers: tuple[tuple[Answer, ...], ...]
    """All usable answers by layer; the last layer holds the final ones (`answer` is the first), one skipped by
    agreement nothing."""
    usage: tuple[LayerUsage, ...]
    """One entry per layer, 0 .. L."""
    messages: tuple[Message, ...]
    """The conversation the final answer was written from (aggregator prompt included, where it was written)."""


Event = ProposalDone | LayerDone | AnswerDelta | Finished
