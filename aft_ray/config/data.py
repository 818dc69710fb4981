"""The data rooms, in the order data flows: prompts, proposals, scores, selection, targets, training set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.engines import EngineConfig, PlacementConfig
from aft_ray.config.strict import SamplingField, Strict
from aft_ray.engines.base import Sampling


class ResponsesConfig(Strict):
    """Where a source keeps several answers to one prompt: what off-policy proposals are made from."""

    column: str | None = None
    """A list column: each item a text, or an object with the fields below."""
    columns: tuple[str, ...] = ()
    """Instead of `column`: one column per answer (`[chosen, rejected]`), a text or messages ending in the answer."""
    text: str = "text"
    """Field of an item with the answer."""
    model: str | None = "model"
    """Field of an item with the name of its model, where there is one."""
    score: str | None = None
    """Field of an item with a score the source gives; kept on the row, never taken for the run's own score."""

    @model_validator(mode="after")
    def _one_place(self) -> ResponsesConfig:
        if (self.column is None) == (not self.columns):
            raise ValueError("set either 'column' (a list column) or 'columns' (one column per answer)")
        return self


ULTRAFEEDBACK = ResponsesConfig(column="completions", text="response", model="model", score="overall_score")
"""The layout of openbmb/UltraFeedback: four completions per instruction."""


class PromptsConfig(Strict):
    """Where prompts come from, and which of them are left out."""

    source: str = "packaged:constraints"
    """`packaged:constraints`, a `.jsonl` or `.parquet` file, `hub:<dataset>[:<split>]`, `reasoning_gym:<task>`,
    `arithmetic:<partition>`."""
    column: str | None = None
    """Column with the prompt text or messages; None: the first of `messages`, `prompt`, `query`, `instruction`,
    `question`."""
    reference_column: str | None = None
    responses: Literal["ultrafeedback"] | ResponsesConfig | None = None
    """Answers that the source brings with each prompt (off-policy proposals): a known layout, or a mapping."""
    task: str | None = None
    """Task name written on the rows: chooses the verifier. None: what the source says."""
    license: str | None = None
    """Licence of the source, for the data set's card."""
    limit: int | None = Field(default=None, ge=1)
    held_out: int = Field(default=32, ge=0)
    """Prompts kept out of training, for evaluation: chosen by a seeded hash of the prompt id."""
    on_bad_row: Literal["refuse", "fail"] = "fail"
    """`fail`: a row that cannot be used goes to prompts/failed/ with its reason. `refuse`: it ends the run at once."""
    odd_text: Literal["keep", "fail"] = "fail"
    """Text with NUL, half characters, control strings of a chat format, or more than half a million characters. `fail`:
    it is a bad row (`on_bad_row`). `keep`: half characters become U+FFFD, control strings are broken where text becomes
    ids, what fits no window fails there."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """Rows with the same conversation: an error, or all but the first left out and listed."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Leave out prompts whose Jaccard similarity of character 5-grams (MinHash) to an earlier one reaches this."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets, as sources: a prompt that shares `decontaminate_ngram` words in a row with one is left out."""
    decontaminate_ngram: int = Field(default=13, ge=2)
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Rows per output file, the unit of resume. None: 8 at first, growing to 512, so a large run has few files."""


class ProposerConfig(Strict):
    """One of several sources of proposals."""

    source: Literal["on_policy", "off_policy"] = "on_policy"
    """`on_policy`: sampled from a model. `off_policy`: the answers that came with the prompt (`prompts.responses`)."""
    share: float = Field(default=1, gt=0)
    """Its part of `proposals.num_per_prompt`, relative to the other proposers' shares."""
    name: str | None = None
    """Model name on the rows; None: the engine's."""
    engine: EngineConfig | None = None
    """None: the run's `engine`. Another model than the run's makes its proposals off-policy, and the rows say so."""
    adapter: str | None = None
    sampling: SamplingField | None = None
    """None: `proposals.sampling`."""
    style: Literal["auto", "chat", "in_context"] = "auto"
    placement: PlacementConfig = PlacementConfig()


class ProposalsConfig(Strict):
    """Drafts sampled from the model to be trained (paper: temperature 1.0, top-k 50, top-p 0.95)."""

    num_per_prompt: int = Field(default=8, ge=1)
    sampling: SamplingField = Sampling(temperature=1.0, top_k=50, top_p=0.95)
    style: Literal["auto", "chat", "in_context"] = "auto"
    """`auto`: the chat template where the tokenizer has one, else the in-context prompt."""
    adapter: str | None = None
    """Sample from this LoRA adapter (a second round of AFT)."""
    round: int | None = Field(default=None, ge=1)
    """Round of AFT these proposals belong to, written on each. None: 1, or 2 with an adapter."""
    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    proposers: tuple[ProposerConfig, ...] = ()
    """Several sources with a share each. Empty: one on-policy proposer made from the settings above."""
    too_few: Literal["keep", "fill", "drop", "fail"] = "keep"
    """A prompt with fewer usable proposals than K: `keep` it with what there is, `fill` up with samples of the last
    on-policy proposer, `drop` it (counted), or `fail` it."""
    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _possible(self) -> ProposalsConfig:
        if len(self.proposers) > self.num_per_prompt:
            raise ValueError(
                f"num_per_prompt {self.num_per_prompt} < {len(self.proposers)} proposers: one each at least"
            )
        if self.too_few == "fill" and not (self.proposers and self.proposers[-1].source == "on_policy"):
            raise ValueError("too_few 'fill' needs proposers whose last one is on_policy: it writes what is missing")
        return self

    @property
    def all_proposers(self) -> tuple[ProposerConfig, ...]:
        """The proposers in the order they write."""
        return self.proposers or (
            ProposerConfig(
                engine=self.engine,
                adapter=self.adapter,
                sampling=self.sampling,
                style=self.style,
                placement=self.placement,
            ),
        )


class JudgeConfig(Strict):
    """An LLM that compares proposals pairwise, each pair in both orders."""

    engine: EngineConfig
    sampling: SamplingField = Sampling(temperature=0.0, max_tokens=16)
    num_opponents: int | None = Field(default=None, ge=1)
    """Others each proposal is compared with, drawn by seed. None: all of them (N x (N-1) calls per prompt)."""


class LikelihoodConfig(Strict):
    """Score = log-probability of the proposal under a model."""

    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    adapter: str | None = None
    per_token: bool = True
    """Mean over tokens; the plain sum favours short answers."""


class ScoresConfig(Strict):
    """How proposals are scored. `none` leaves every score None; nothing is made up."""

    scorer: Literal[
        "auto",
        "constraints",
        "numeric",
        "reasoning_gym",
        "ifeval",
        "agreement",
        "length",
        "reward_model",
        "judge",
        "likelihood",
        "none",
    ] = "auto"
    """`auto`: the verifier of the row's task, `none` where it has none. `length` is a control, not a reward."""
    reward_model: str | None = None
    """Hub id or folder of a sequence-classification reward model, for scorer `reward_model`."""
    judge: JudgeConfig | None = None
    """For scorer `judge`."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
    """For scorer `likelihood`."""
    placement: PlacementConfig = PlacementConfig()


class SelectionConfig(Strict):
    """Which K proposals a prompt keeps, and which prompts are kept at all."""

    num_proposals: int = Field(default=4, ge=1)
    """K."""
    strategy: Literal["top_k", "random", "stratified", "diverse"] = "top_k"
    """`top_k` by score. `stratified`: K spread evenly over the ranks, best to worst (matched-quality studies).
    `diverse`: maximal marginal relevance. Unscored proposals come last, by a seeded draw; the reason is on the row."""
    diversity: float = Field(default=0.5, ge=0, le=1)
    """`diverse`: weight of being unlike those already kept (Jaccard similarity of word 3-grams) against the score."""
    easy_per_hard: float | None = Field(default=None, ge=0)
    """With verifiable answers: keep every prompt whose majority answer is wrong (hard), and this many easy ones for
    each of them (AggLM, arXiv 2509.06870). None: keep all prompts. Held-out prompts are always kept."""
    shuffle: bool = True
    """Seeded random order of the kept ones, so that position does not give the best away."""
    placement: PlacementConfig = PlacementConfig()


class TargetFilters(Strict):
    """Targets that are not trained on, each counted by reason. An empty one never is."""

    truncated: bool = True
    refused: bool = True
    """The target declines to answer."""
    max_copy: float | None = Field(default=None, gt=0, le=1)
    """Leave out targets at least this similar to one proposal (Jaccard of word 3-grams; 1.0 is a copy up to case and
    white space). None: keep."""
    worse_than_best: bool = False
    """Leave out targets that score below the best proposal they were written from."""


class TargetsConfig(Strict):
    """The aggregations to learn. The teacher is `engine`; without one it is the student itself (teacher-free)."""

    source: Literal["teacher", "reference"] = "teacher"
    """`reference`: the prompt's reference answer instead (an ablation); no model is asked."""
    num_candidates: int = Field(default=1, ge=1)
    """M: aggregations written per prompt."""
    keep: Literal["best", "first", "shortest", "all"] = "best"
    """Of the M: `best` by verifier and score, accepted or not; or `first`, `shortest`, `all` of those the verifier
    accepts."""
    pseudo: bool = False
    """Also let the teacher answer without seeing proposals: the targets of variant `pseudo` (paper, Table 4)."""
    filters: TargetFilters = TargetFilters()
    sampling: SamplingField = Sampling(temperature=0.7, top_p=0.95, max_tokens=1024)
    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    adapter: str | None = None
    placement: PlacementConfig = PlacementConfig()


Variant = Literal["sft", "aft", "joint", "sft_reference", "no_proposals", "pseudo"]


class TrainingSetConfig(Strict):
    """Ids and labels, written once."""

    variants: tuple[Variant, ...] = ("sft", "aft")
    """`sft`: prompt -> target. `aft`: prompt + proposals -> target. `joint`: both in one set. `sft_reference`: prompt
    -> reference answer. `no_proposals`: the aggregator's prompt with its slots empty -> target. `pseudo`: prompt +
    proposals -> an answer written without them (paper, Table 4)."""
    vary_num_proposals: tuple[int, int] | None = None
    """Smallest and largest K an example shows, drawn per prompt. None: all selected proposals."""
    max_length: int = Field(default=4096, ge=16)
    """Tokens per example, prompt + target. The length policy makes room for the target; a target is never cut."""
    placement: PlacementConfig = PlacementConfig()
