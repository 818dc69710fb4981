"""The plan: everything that fixes one propose-and-aggregate run.

Layers are counted with the last one included. L = `num_layers`, K = `num_proposals`:

    L=0   one plain sample
    L=1   K proposals -> final answer
    L=2   K proposals -> K aggregations -> final answer
    answers sampled per prompt: K * L + 1 for L >= 1      (paper: K=5, L=2, so 11)

A plan may cost less: `aggregator: vote` counts answers instead of writing layer L, and `early_stop` skips the layers
that agreement makes unnecessary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from aft_ray.engines.base import Sampling, ToolUse
from aft_ray.errors import ConfigError
from aft_ray.templates.budget import LengthPolicy


@dataclass(frozen=True, kw_only=True)
class FinalLayer:
    """What a request asks of the last layer beyond the plan."""

    num_choices: int = 1
    """Number of final answers, each sampled with its own seed from the same prompt (OpenAI's `n`)."""
    top_logprobs: int | None = None
    """Return the log-probability of each token and of this many of the likeliest tokens in its place. None: neither."""
    json_schema: str | None = None
    """JSON schema, as a string, that the answer must follow."""
    echo: str | tuple[int, ...] | None = None
    """A text or its ids that the model goes on with as it is, without a chat template and with its log-probabilities;
    for a plan of one single answer. None: the conversation is answered."""
    tool_use: ToolUse | None = None
    """Tools that the answer may call. Drafts see them described."""
    least_tokens: int | None = None
    """How far `max_tokens` of the last layer may be lowered for a prompt that leaves less room. None: not at all."""
    is_read: bool = True
    """Whether a client reads the answer as it is written. If not, an answer lost with its replica is written again."""

    @property
    def has_grammar(self) -> bool:
        """Whether an engine must compile something that the client sent."""
        return self.json_schema is not None or (self.tool_use is not None and self.tool_use.may_call)


ONE_ANSWER = FinalLayer()


OF_AGGREGATIONS = ("aggregation", "final")
"""Fields of `Plan` with the sampling of aggregations, of which L=0 has none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One propose-and-aggregate run. Defaults are the paper's inference settings at L=1."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    num_proposals: Annotated[int, Ge(1)] = 5
    """Width K: the number of answers in each layer below the last."""
    num_layers: Annotated[int, Ge(0)] = 1
    """Depth L: rounds of aggregation, the final one included. 0 is a plain single sample."""
    proposal: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.95))
    """Sampling of layer 0 (of the only answer at L=0)."""
    aggregation: tuple[Sampling, ...] = field(default_factory=lambda: (Sampling(temperature=0.7, top_p=0.95),))
    """Sampling of the hidden layers 1 .. L-1, in order; the last entry also applies to all layers after it."""
    final: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    """Sampling of layer L."""
    subset_size: Annotated[int, Ge(1)] | None = None
    """M: each aggregation sees M of the K current answers, drawn without replacement. None is M=K (AFT); M < K is
    recursive self-aggregation (arXiv 2509.26626)."""
    shuffle: bool = False
    """Show answers in a seeded random order, so that their position carries no meaning (PaCoRe, 2601.05593)."""
    drop_duplicates: bool = False
    """Show equal answers only once. Off by default: the paper's models are trained on K slots."""
    quorum: Annotated[int, Ge(1)] | None = None
    """q: usable answers that a layer needs before the next one may start. None: half of K, rounded up."""
    draft_deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds that a layer waits for all K answers; after that, q are enough and the stragglers are cancelled."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds for the whole run; after that, DeadlineExceeded is raised."""
    hedge_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which a layer below the last requests its unfinished answers a second time, with the same seeds.
    The copy that ends first is kept; the tokens of both count. None: no second request."""
    early_stop: Literal["exact", "answer"] | None = None
    """Skip the layers above one whose usable answers (at least two) all agree: `exact`, in their whole text; `answer`,
    in their short answer (`answers.short_answer`). None: write every layer."""
    aggregator: Literal["model", "vote"] = "model"
    """What makes layer L. `vote`: the most frequent short answer of layer L-1; among equally frequent ones, the answer
    that the model finds likelier. Meant for multiple choice and bare numbers, which hold too little to aggregate
    (arXiv 2501.11877, 5.2)."""
    show_thinking: bool = False
    """Show an aggregator what the models thought before their answers too, where the engine tells the two apart."""
    length_policy: LengthPolicy = "drop_longest"
    """What is shortened when an aggregation prompt does not fit the window."""

    def __post_init__(self) -> None:
        if self.subset_size is not None and self.subset_size > self.num_proposals:
            raise ConfigError(
                f"subset_size {self.subset_size} > num_proposals {self.num_proposals}: an aggregation cannot see more "
                "answers than a layer has. Lower subset_size or leave it out"
            )
        if self.quorum is not None and self.quorum > self.num_proposals:
            raise ConfigError(
                f"quorum {self.quorum} > num_proposals {self.num_proposals}: no layer could ever meet it. Lower quorum"
            )
        if not self.aggregation:
            raise ConfigError("aggregation is empty: give the sampling of at least one hidden layer, or leave it out")

    @property
    def num_samples(self) -> int:
        """Number of answers sampled per prompt: the cost of the plan in model calls. A vote samples none."""
        return self.num_proposals * self.num_layers + (not self.num_layers or self.aggregator == "model")

    @property
    def quorum_needed(self) -> int:
        """Number of usable answers that every layer below the last must have."""
        return self.quorum if self.quorum is not None else (self.num_proposals + 1) // 2

    def sampling_of(self, layer: int) -> Sampling:
        """Return the sampling of one layer, 0 <= layer <= L."""
        if layer == 0:
            return self.proposal
        if layer == self.num_layers:
            return self.final
        return self.aggregation[min(layer, len(self.aggregation)) - 1]
