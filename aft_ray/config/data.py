"""The settings of the data stages, in order: prompts, proposals, scores, selection, targets, training set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.engines import EngineConfig, PlacementConfig
from aft_ray.config.strict import SamplingField, Strict
from aft_ray.engines.base import Sampling


class ResponsesConfig(Strict):
    """Describes where each row of a source keeps several answers to its prompt. They become off-policy proposals."""

    column: str | None = None
    """Name of a column that holds a list of answers. Each item is a text, or an object with the fields below."""
    columns: tuple[str, ...] = ()
    """Names of columns that hold one answer each, for example `[chosen, rejected]`. Set this or `column`. The value is
    a text, or a conversation that ends with the answer."""
    text: str = "text"
    """Field of an item that holds the answer."""
    model: str | None = "model"
    """Field of an item that names the model which wrote the answer. The field may be missing."""
    score: str | None = None
    """Field of an item that holds the source's score. It is kept on the row, but never used as this run's score."""

    @model_validator(mode="after")
    def _one_place(self) -> ResponsesConfig:
        if (self.column is None) == (not self.columns):
            raise ValueError("set either 'column' (a list column) or 'columns' (one column per answer)")
        return self


ULTRAFEEDBACK = ResponsesConfig(column="completions", text="response", model="model", score="overall_score")
"""The layout of openbmb/UltraFeedback, which has four completions per instruction."""


class PromptsConfig(Strict):
    """Configures where prompts come from and which of them are removed."""

    source: str = "packaged:constraints"
    """One of `packaged:constraints`, a `.jsonl` or `.parquet` file, `hub:DATASET[@CONFIG][:SPLIT]`,
    `reasoning_gym:TASK[,TASK...]`, or `arithmetic:PARTITION`."""
    column: str | None = None
    """Column that holds the prompt, as text or as messages. None: the first of `messages`, `prompt`, `query`,
    `instruction`, `question` that the row has."""
    reference_column: str | None = None
    """Column that holds the reference answer. None: `reference`, if the row has it."""
    responses: Literal["ultrafeedback"] | ResponsesConfig | None = None
    """Where the source keeps answers to each prompt, for off-policy proposals: a known layout or a description of one.
    None: the source has no answers, or they are not needed."""
    task: str | None = None
    """Task name written on every row; it chooses the verifier. None: the row's own `task`, if it has one."""
    license: str | None = None
    """Licence of the source. It is printed on the data card."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read from the start of the source. None: all of them (500 from a procedural source)."""
    held_out: int = Field(default=32, ge=0)
    """Number of prompts kept out of training, for evaluation. A seeded hash of the prompt id chooses them."""
    on_bad_row: Literal["record", "stop"] = "record"
    """What happens to a row that cannot be used. `record`: the row fails, prompts/failed/ lists its place and error,
    and the run goes on (up to `run.max_failure_rate`). `stop`: the run ends with an error at the first such row."""
    unusual_text: Literal["reject", "keep"] = "reject"
    """What happens to a prompt with NUL, lone surrogates, control tokens of a chat format, or more than 500,000
    characters. `reject`: it is a bad row (see `on_bad_row`). `keep`: it is accepted; lone surrogates become U+FFFD, and
    control tokens are broken up when the text is tokenized."""
    duplicates: Literal["reject", "drop"] = "reject"
    """What happens to a row that repeats an earlier conversation. `reject`: it is a bad row (see `on_bad_row`). `drop`:
    it is removed and listed in prompts/removed.jsonl."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Remove a prompt if its similarity to an earlier one reaches this threshold. The similarity is the Jaccard index
    of character 5-grams, estimated with MinHash. None: near duplicates are kept."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets, written like `source`. Remove a prompt if it shares `decontaminate_ngram` consecutive words with
    a prompt of one of these sets."""
    decontaminate_ngram: int = Field(default=13, ge=2)
    """Number of consecutive words that count as an overlap with an evaluation set."""
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Number of rows per output file. A file is the unit of resume. None: files grow from 8 rows to 512, so that small
    runs have several files and large runs have few."""


class ProposerConfig(Strict):
    """One of several sources of proposals."""

    source: Literal["on_policy", "off_policy"] = "on_policy"
    """`on_policy`: the proposals are sampled from a model. `off_policy`: they are the answers that came with the prompt
    (`prompts.responses`)."""
    share: float = Field(default=1, gt=0)
    """Weight of this proposer when `proposals.num_per_prompt` is divided among the proposers."""
    name: str | None = None
    """Model name written on the proposals. None: the name of the engine's model or of the answer's own model."""
    engine: EngineConfig | None = None
    """Engine that samples the proposals. None: the run's `engine`. If its model differs from the run's model, the
    proposals are marked `off-policy`."""
    adapter: str | None = None
    """Folder of a LoRA adapter to sample from. None: the base model."""
    sampling: SamplingField | None = None
    """Sampling parameters. None: `proposals.sampling`."""
    style: Literal["auto", "chat", "in_context"] = "auto"
    """Prompt format, as in `proposals.style`."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors for this proposer, and the resources of each."""


class ProposalsConfig(Strict):
    """Configures how the draft answers to each prompt are made."""

    num_per_prompt: int = Field(default=8, ge=1)
    """Number of proposals per prompt, over all proposers."""
    sampling: SamplingField = Sampling(temperature=1.0, top_k=50, top_p=0.95)
    """Sampling parameters. The default is the paper's."""
    style: Literal["auto", "chat", "in_context"] = "auto"
    """Prompt format. `chat`: the tokenizer's chat template. `in_context`: a few-shot prompt for base models. `auto`:
    `chat` if the tokenizer has a chat template, otherwise `in_context`."""
    adapter: str | None = None
    """Folder of a LoRA adapter to sample from, for a second round of AFT. None: the base model."""
    round: int | None = Field(default=None, ge=1)
    """Round of AFT written on each proposal. None: 2 if the proposer has an adapter, otherwise 1."""
    engine: EngineConfig | None = None
    """Engine that samples the proposals. None: the run's `engine`."""
    proposers: tuple[ProposerConfig, ...] = ()
    """Several sources of proposals, each with its share. Empty: one on-policy proposer with the settings above."""
    too_few: Literal["keep", "fill", "drop", "fail"] = "keep"
    """What happens to a prompt with fewer usable proposals than `selection.num_proposals`. `keep`: it goes on with the
    proposals it has. `fill`: the last proposer, which must be on-policy, samples what is missing. `drop`: it is removed
    and counted. `fail`: its row fails."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each. Set it in each of `proposers` if there are several."""

    @model_validator(mode="after")
    def _is_possible(self) -> ProposalsConfig:
        if len(self.proposers) > self.num_per_prompt:
            raise ValueError(
                f"num_per_prompt {self.num_per_prompt} < {len(self.proposers)} proposers: each needs at least one"
            )
        if self.too_few == "fill" and not (self.proposers and self.proposers[-1].source == "on_policy"):
            raise ValueError(
                "too_few 'fill' needs `proposers` that end with an on_policy one: it samples the missing proposals"
            )
        return self

    @property
    def all_proposers(self) -> tuple[ProposerConfig, ...]:
        """The proposers in the order in which they run."""
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
    """An LLM judge that compares proposals pairwise, each pair in both orders."""

    engine: EngineConfig
    """Engine of the judge."""
    sampling: SamplingField = Sampling(temperature=0.0, max_tokens=16)
    """Sampling parameters of the judge's replies."""
    num_opponents: int | None = Field(default=None, ge=1)
    """Number of other proposals that each proposal is compared with; a seeded draw chooses them. None: all of them,
    which takes N x (N-1) calls per prompt."""


class LikelihoodConfig(Strict):
    """Scores a proposal by its log-probability under a model."""

    engine: EngineConfig | None = None
    """Engine of the model. None: the run's `engine`."""
    adapter: str | None = None
    """Folder of a LoRA adapter for the model. None: the base model."""
    per_token: bool = True
    """True: the score is the mean over the proposal's tokens. False: it is their sum, which favours short answers."""


class ScoresConfig(Strict):
    """Configures how proposals are scored."""

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
    """`constraints`, `numeric`, `reasoning_gym`, `ifeval`: the verifier of that task. `auto`: the verifier of the row's
    own task, or no score if it has none. `agreement`: the share of the other proposals with the same short answer.
    `length`: the number of characters, as a control. `reward_model`, `judge`, `likelihood`: see the settings below.
    `none`: no proposal gets a score."""
    reward_model: str | None = None
    """Hub id or folder of a sequence-classification reward model. Scorer `reward_model` needs it."""
    judge: JudgeConfig | None = None
    """The judge. Scorer `judge` needs it."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
    """The model of scorer `likelihood`."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""

    @model_validator(mode="after")
    def _is_complete(self) -> ScoresConfig:
        if self.scorer == "reward_model" and self.reward_model is None:
            raise ValueError(
                "scores.scorer is reward_model but scores.reward_model is not set: give the hub id or folder of a "
                "sequence-classification reward model, or choose another scorer"
            )
        if self.scorer == "judge" and self.judge is None:
            raise ValueError("scores.scorer is judge: set scores.judge.engine to the judge's engine")
        return self


class SelectionConfig(Strict):
    """Configures which K proposals of a prompt are selected, and which prompts are kept."""

    num_proposals: int = Field(default=4, ge=1)
    """K, the number of proposals selected per prompt."""
    strategy: Literal["top_k", "random", "stratified", "diverse"] = "top_k"
    """`top_k`: the K best scores. `random`: a seeded draw. `stratified`: K scores spread evenly from best to worst, for
    studies with matched quality. `diverse`: maximal marginal relevance. Proposals without a score come last, in random
    order."""
    diversity: float = Field(default=0.5, ge=0, le=1)
    """For `diverse`: the weight, against the score, of being dissimilar to the proposals already selected (Jaccard
    index of word 3-grams)."""
    easy_per_hard: float | None = Field(default=None, ge=0)
    """Number of easy prompts kept per hard prompt (AggLM, arXiv 2509.06870). A prompt is hard if more than half of its
    scored proposals are wrong; hard prompts and held-out prompts are always kept. None: every prompt is kept."""
    shuffle: bool = True
    """True: the selected proposals are shown in a seeded random order, so that the position does not reveal the best.
    False: they keep the order in which they were made."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""


class TargetFilters(Strict):
    """Configures which targets are left out of the training set. An empty target always is."""

    truncated: bool = True
    """Leave out targets that were cut off at `max_tokens`."""
    refused: bool = True
    """Leave out targets that decline to answer. The check knows English only."""
    max_similarity: float | None = Field(default=None, gt=0, le=1)
    """Leave out targets whose similarity to one of their proposals reaches this threshold (Jaccard index of word
    3-grams; 1.0 is a copy that differs in letter case and white space at most). None: copies are kept."""
    worse_than_best: bool = False
    """Leave out targets that score lower than the best of their proposals."""


class TargetsConfig(Strict):
    """Configures how targets are made: the aggregations that the student learns to write."""

    source: Literal["teacher", "reference"] = "teacher"
    """`teacher`: a model writes the targets. `reference`: the reference answers of the prompts are the targets (an
    ablation)."""
    num_candidates: int = Field(default=1, ge=1)
    """M, the number of aggregations that the teacher writes per prompt."""
    keep: Literal["best", "first", "shortest", "all"] = "best"
    """Which of the M candidates become targets. `best`: the one that the verifier and the score prefer, whether or not
    the verifier accepts it. `first`, `shortest`, `all`: only candidates that the verifier accepts."""
    pseudo: bool = False
    """True: the teacher also writes an answer without seeing the proposals, for variant `pseudo` (paper, Table 4)."""
    filters: TargetFilters = TargetFilters()
    """Which targets are left out of the training set."""
    sampling: SamplingField = Sampling(temperature=0.7, top_p=0.95, max_tokens=1024)
    """Sampling parameters of the teacher."""
    engine: EngineConfig | None = None
    """Engine of the teacher. None: the run's `engine`, so that the student is its own teacher."""
    adapter: str | None = None
    """Folder of a LoRA adapter for the teacher. None: the base model."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""


Variant = Literal["sft", "aft", "joint", "sft_reference", "no_proposals", "pseudo"]


class TrainingSetConfig(Strict):
    """Configures how targets become token ids and labels."""

    variants: tuple[Variant, ...] = ("sft", "aft")
    """The training sets to build, each by what its examples show and teach. `sft`: prompt -> target. `aft`: prompt and
    proposals -> target. `joint`: both kinds of example in one set. `sft_reference`: prompt -> reference answer.
    `no_proposals`: the aggregation prompt with empty slots -> target. `pseudo`: prompt and proposals -> an answer
    written without them (paper, Table 4)."""
    vary_num_proposals: tuple[int, int] | None = None
    """Smallest and largest number of proposals in an example; each prompt draws its own number. None: every example
    shows all selected proposals."""
    max_length: int = Field(default=4096, ge=16)
    """Largest number of tokens in an example, prompt and target together. `templates.length_policy` shortens the prompt
    if necessary; a target is never cut."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""
