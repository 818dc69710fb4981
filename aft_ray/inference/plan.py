"""The plan: everything that fixes one propose-and-aggregate run.

Layers are counted with the last one included. L = `num_layers`, K = `num_proposals`:

    L=0   one plain sample
    L=1   K proposals -> final answer
    L=2   K proposals -> K aggregations -> final answer
    answers sampled per prompt: K * L + 1 for L >= 1      (paper: K=5, L=2, so 11)

A plan may make do with less: `aggregator: vote` counts instead of writing layer L, `early_stop` skips what agreement
makes needless.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from aft_ray.engines.base import Sampling
from aft_ray.errors import ConfigError
from aft_ray.templates.budget import LengthPolicy


@dataclass(frozen=True, kw_only=True)
class FinalLayer:
    """What a request asks of its last layer besides the plan."""

    num_answers: int = 1
    """Final answers, each with a seed of its own, from the same answers below."""
    top_logprobs: int | None = None
    """Tell the log-probability of each token, and of this many likeliest ones."""
    json_schema: str | None = None
    """Answer with JSON that this schema, itself JSON, allows."""
    is_read: bool = True
    """Somebody reads its pieces as they are made. Where nobody does, an answer lost with its replica is begun again."""


ONE_ANSWER = FinalLayer()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One propose-and-aggregate run. Defaults are the paper's inference settings at L=1."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    num_proposals: Annotated[int, Ge(1)] = 5
    """Width K: answers per layer that feed the next one."""
    num_layers: Annotated[int, Ge(0)] = 1
    """Depth L: rounds of aggregation, the final one included. 0 is a plain single sample."""
    proposal: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.95))
    """Layer 0 (and the only answer at L=0)."""
    aggregation: tuple[Sampling, ...] = field(default_factory=lambda: (Sampling(temperature=0.7, top_p=0.95),))
    """Hidden layers 1 .. L-1, in order; the last entry serves every layer after it."""
    final: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    """Layer L."""
    subset_size: Annotated[int, Ge(1)] | None = None
    """M: each aggregation sees M of the K current answers, drawn without replacement. None is M=K (AFT); M < K is
    recursive self-aggregation (arXiv 2509.26626)."""
    shuffle: bool = False
    """Seeded random order of the proposals of a layer, so that position carries nothing (PaCoRe, 2601.05593)."""
    drop_duplicates: bool = False
    """Show an answer once, however many samples gave it. Off: the paper's models are trained on K slots."""
    quorum: Annotated[int, Ge(1)] | None = None
    """q: answers a layer needs before the next may start. None is a majority of K."""
    draft_deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds a layer waits for all K; after that, q answers are enough and the stragglers are cancelled."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds for the whole run; after that, DeadlineExceeded."""
    hedge_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which a layer below the last asks a second time for what is still unwritten, with the same seeds;
    whichever copy ends first is kept, and both are paid for. None: never."""
    early_stop: Literal["exact", "answer"] | None = None
    """Skip the layers above one whose usable answers (two at least) all agree: `exact`, in their whole text; `answer`,
    in the short answer they come down to (`answers.short_answer`). None: never."""
    aggregator: Literal["model", "vote"] = "model"
    """Who makes layer L. `vote`: the short answer that most of layer L-1 gave, a tie going to what the model finds
    likelier. For multiple choice and bare numbers, which hold too little to aggregate (arXiv 2501.11877, 5.2)."""
    length_policy: LengthPolicy = "drop_longest"

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
    def num_answers(self) -> int:
        """Answers sampled per prompt: the cost of the plan in model calls. A vote samples none of its own."""
        return self.num_proposals * self.num_layers + (not self.num_layers or self.aggregator == "model")

    @property
    def quorum_needed(self) -> int:
        """Usable answers that every layer below the last must have."""
        return self.quorum if self.quorum is not None else (self.num_proposals + 1) // 2

    def sampling_of(self, layer: int) -> Sampling:
        """The sampling of one layer, 0 <= layer <= L."""
        if layer == 0:
            return self.proposal
        if layer == self.num_layers:
            return self.final
        return self.aggregation[min(layer, len(self.aggregation)) - 1]
