"""The events of a propose-and-aggregate run, in order. Batch inference waits for the last one, Serve streams them, and
evaluation keeps them.

ProposalDone*  LayerDone  ProposalDone*  LayerDone  ...  AnswerDelta*  Finished
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aft_ray.engines.base import CallPiece, TokenLogprob
from aft_ray.records import Message


@dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """Usage of one layer, including its failed and cancelled answers."""

    layer: int
    prompt_tokens: int = 0
    """Prompt tokens sent. A prompt counts once for each answer to it."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """The part of `completion_tokens` that the models thought before their answers, where the engine knows it."""
    cached_tokens: int = 0
    """The part of `prompt_tokens` that the engine found in its prefix cache."""
    num_answers: int = 0
    """Usable answers: those that were written to their end and are not empty."""
    num_failed: int = 0
    """Answers that failed or are empty."""
    num_cancelled: int = 0
    """Stragglers cancelled by the draft deadline, and duplicate requests (`hedge_s`) that lost the race."""
    seconds: float = 0.0
    decided_by: Literal["model", "vote", "agreement"] = "model"
    """`vote`: the last layer counted the answers below. `agreement`: those were all equal, so no model was asked."""


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
    """Indices of the answers of the layer below that its prompt showed, in that order. For a final answer decided by
    vote or agreement: indices of the answers that gave it, in the last layer that was written."""
    length_action: str | None = None
    """What the length policy did to its inputs, such as `drop_longest: dropped 2 of 5`; None when everything fitted."""
    reasoning: str = ""
    """What the model thought before the answer. No other model is shown it, unless `Plan.show_thinking` says so."""
    num_reasoning_tokens: int = 0
    tool_calls: tuple[CallPiece, ...] = ()
    """Tools that a final answer calls."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of a final answer's tokens, where the request asked for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Those of its prompt's tokens, where the request asked for them."""


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
    """A piece of the final answer, as it is written. One decided without a model is a single piece of 0 tokens."""

    text: str
    num_tokens: int
    index: int = 0
    """Index of the final answer it belongs to."""
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    """A piece of what the model thinks before the answer."""
    tool_calls: tuple[CallPiece, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The run is over; this holds its whole result."""

    answer: Answer
    layers: tuple[tuple[Answer, ...], ...]
    """All usable answers by layer. The last layer holds the final answers (`answer` is the first); a layer that
    agreement skipped is empty."""
    usage: tuple[LayerUsage, ...]
    """One entry per layer, 0 .. L."""
    messages: tuple[Message, ...]
    """The conversation the final answer was written from, with the aggregator prompt where there was one."""


Event = ProposalDone | LayerDone | AnswerDelta | Finished
