"""The settings of the data stages, in order: prompts, proposals, scores, selection, targets, training set."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from aft_ray.config.engines import EngineConfig, PlacementConfig
from aft_ray.config.strict import SamplingField, Strict
from aft_ray.engines.base import Sampling
from aft_ray.errors import nearest

VerifierName = Literal["constraints", "numeric", "math", "choice", "exact", "reasoning_gym", "ifeval", "ifbench"]
VERIFIERS: frozenset[str] = frozenset(get_args(VerifierName))
"""Scorers, and tasks, whose score of 1.0 means correct."""
ScorerName = Literal[
    "auto",
    "constraints",
    "numeric",
    "math",
    "choice",
    "exact",
    "reasoning_gym",
    "ifeval",
    "ifbench",
    "agreement",
    "source",
    "length",
    "reward_model",
    "judge",
    "likelihood",
    "none",
]


def is_verifier(name: str | None) -> bool:
    """Whether a score of 1.0 by this scorer means correct: a known verifier, or a function by its import path."""
    return name is not None and (name in VERIFIERS or ":" in name)


def _known_scorer(value: Any) -> Any:
    names = get_args(ScorerName)
    if value not in names:
        raise ValueError(f"unknown scorer {value!r}; {nearest(value, names, kind='scorers')}")
    return value


class ResponsesConfig(Strict):
    """Describes where each row of a source keeps answers to its prompt. They become off-policy proposals."""

    column: str | None = None
    """Name of a column that holds a list of answers. Each item is a text, or an object with the fields below."""
    columns: tuple[str, ...] = ()
    """Names of columns that hold one answer each, for example `[chosen, rejected]`. Set this or `column`. The value is
    a text, or a conversation that ends with the answer."""
    models: tuple[str, ...] = ()
    """With `columns`: for each of them, the column that names the model. Such a column may be missing."""
    scores: tuple[str, ...] = ()
    """With `columns`: for each of them, the column that holds the source's score. Such a column may be missing."""
    text: str = "text"
    """Field of an item that holds the answer."""
    model: str | None = "model"
    """Field of an item that names the model which wrote the answer. The field may be missing."""
    score: str | None = None
    """Field of an item that holds the source's score. Scorer `source` uses it (`scores.scorer`)."""
    rank: str | None = None
    """Field of an item that holds its rank, 1 for the best answer. Its negative is the score."""

    @model_validator(mode="after")
    def _one_place(self) -> ResponsesConfig:
        if (self.column is None) == (not self.columns):
            raise ValueError("set either 'column' (a list column) or 'columns' (one column per answer)")
        for name, beside in (("models", self.models), ("scores", self.scores)):
            if beside and len(beside) != len(self.columns):
                raise ValueError(
                    f"{name}: {len(beside)} columns beside {len(self.columns)} of answers; name one for each"
                )
        return self


LAYOUTS = {
    "ultrafeedback": ResponsesConfig(column="completions", text="response", score="overall_score"),
    "preference": ResponsesConfig(columns=("chosen", "rejected"), scores=("score_chosen", "score_rejected")),
    "helpsteer": ResponsesConfig(columns=("response",), scores=("helpfulness",)),
    "nectar": ResponsesConfig(column="answers", text="answer", rank="rank"),
}
"""Known layouts of answers: openbmb/UltraFeedback, preference pairs, nvidia/HelpSteer, berkeley-nest/Nectar."""


class PromptsConfig(Strict):
    """Configures where prompts come from and which of them are removed."""

    source: str = "packaged:constraints"
    """One of `packaged:constraints`; a file, a folder or a glob (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, all but
    the last with `.gz`, `.zst` or `.bz2` as well); `hub:DATASET[@CONFIG][:SPLIT][#REVISION]`;
    `reasoning_gym:TASK[,TASK...]`; `arithmetic:PARTITION`."""
    column: str | None = None
    """Column that holds the prompt, as text or as messages. None: the first of `messages`, `conversations`,
    `conversation`, `prompt`, `query`, `instruction`, `question` that the row has."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are not part of the question although their names suggest it, such as `input`, `system` or `tools`.
    They are kept as metadata."""
    reference_column: str | None = None
    """Column that holds the reference answer. None: `reference`, if the row has it, else the answer at the end of the
    row's conversation, if there is one."""
    responses: Literal["ultrafeedback", "preference", "helpsteer", "nectar"] | ResponsesConfig | None = None
    """Where the source keeps answers to each prompt, for off-policy proposals: a known layout or a description of one.
    None: the source has no answers, or they are not needed."""
    task: str | None = None
    """Task name written on every row; it chooses the verifier. None: the row's own `task`, if it has one."""
    license: str | None = None
    """Licence of the source. It is printed on the data card."""
    description: str | None = None
    """What the prompts are, in a sentence or two. It is printed on the data card."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read from the start of the source. None: all of them (500 from a procedural source)."""
    held_out: int = Field(default=32, ge=0)
    """Number of conversations kept out of training, for evaluation. A seeded hash of their text chooses them, and
    prompts that differ from one of them only in case, spacing or system message are held out too."""
    on_bad_row: Literal["record", "stop"] = "record"
    """What happens to a row that cannot be used. `record`: the row fails, prompts/failed/ lists its place and error,
    and the run goes on (up to `run.max_failure_rate`). `stop`: the run ends with an error at the first such row."""
    unusual_text: Literal["reject", "keep"] = "reject"
    """What happens to a prompt with NUL, lone surrogates, control tokens of a chat format, or more than 500,000
    characters. `reject`: it is a bad row (see `on_bad_row`). `keep`: it is accepted; lone surrogates become U+FFFD, and
    control tokens are broken up when the text is tokenized."""
    duplicates: Literal["reject", "drop", "group", "keep"] = "reject"
    """What happens to a row that repeats an earlier conversation, whatever its id. `reject`: it is a bad row (see
    `on_bad_row`). `drop`: it is removed and listed in prompts/removed.jsonl. `group`: its answers (`responses`) join
    those of the earlier row. `keep`: it is a separate prompt if the source gives it a separate id."""
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

    @field_validator("source", "decontaminate")
    @classmethod
    def _names_a_data_set(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for source in (value,) if isinstance(value, str) else value:
            if re.fullmatch(r"hub:([@:#].*)?", source):
                raise ValueError(
                    f"{source!r} names no data set of the hub; expected hub:DATASET[@CONFIG][:SPLIT][#REVISION]"
                )
        return value

    @model_validator(mode="after")
    def _groups_answers(self) -> PromptsConfig:
        if self.duplicates == "group" and self.responses is None:
            raise ValueError("duplicates 'group' joins the answers of rows: set `responses` to where a row has them")
        return self


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
    """What happens to a prompt with fewer usable proposals than `selection.num_proposals`. `keep`: it continues with
    the proposals it has. `fill`: the last proposer, which must be on-policy, samples what is missing. `drop`: it is
    removed and counted. `fail`: its row fails."""
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

    scorer: Annotated[ScorerName, BeforeValidator(_known_scorer)] = "auto"
    """`constraints`, `numeric`, `math`, `choice`, `exact`, `reasoning_gym`, `ifeval`, `ifbench`: that verifier. `auto`:
    `verifier`, else the verifier of the row's own task, or no score if it has none. `agreement`: the share of the other
    proposals with the same short answer. `source`: the score that came with the answer (`prompts.responses`). `length`:
    the number of characters, as a control. `reward_model`, `judge`, `likelihood`: see the settings below. `none`: no
    proposal gets a score."""
    verifier: str | None = None
    """What checks answers to every prompt, targets included: the name of a verifier, or the import path of your own
    function, `mypackage.mymodule:function`. None: the verifier of each row's task."""
    reward_model: str | None = None
    """Hub id or folder of a sequence-classification reward model. Scorer `reward_model` needs it."""
    reward_engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the reward model. `vllm` uses vLLM's pooling runner, for large models and for several GPUs."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Largest number of tokens, padding included, that the reward model reads in one forward pass of transformers."""
    judge: JudgeConfig | None = None
    """The judge. Scorer `judge` needs it."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
    """The model of scorer `likelihood`."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""

    @field_validator("verifier")
    @classmethod
    def _known_verifier(cls, value: str | None) -> str | None:
        module, _, function = (value or "").partition(":")
        is_path = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if value is not None and value not in VERIFIERS and not is_path:
            hint = nearest(value, sorted(VERIFIERS), kind="verifiers")
            raise ValueError(f"unknown verifier {value!r} (a function of your own: package.module:function); {hint}")
        return value

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

    finish_reasons: tuple[str, ...] = ("stop",)
    """Leave out targets that ended for any other reason: `length` (cut off at `max_tokens`), `content_filter`,
    `tool_calls`, `refusal` (an endpoint's own field), ..."""
    rejected: bool = True
    """Leave out targets that the verifier of the prompt's task rejected."""
    refused: bool = False
    """Leave out targets whose text declines to answer. The check knows English only."""
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
    """Which of the M candidates become targets. `best`: the one that the verifier and the score prefer (one that the
    verifier rejects is left out of training, unless `filters.rejected` is false). `first`, `shortest`, `all`: only
    candidates that the verifier accepts."""
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

    source: Literal["targets", "prompts"] = "targets"
    """What the examples teach. `targets`: the targets that the earlier stages made. `prompts`: the answers that came
    with the prompts (`prompts.reference_column`, or the end of a conversation). Then no proposals, scores, selection or
    targets are made, and the one variant is `sft_reference`."""
    answers: Literal["last", "all"] = "last"
    """With source `prompts`, which answers of a conversation are in the loss: the last, or every turn of the assistant,
    each after the ids that it follows when it is served."""
    variants: tuple[Variant, ...] = ("sft", "aft")
    """The training sets to build, each by what its examples show and teach. `sft`: prompt -> target. `aft`: prompt and
    proposals -> target. `joint`: both kinds of example in one set. `sft_reference`: prompt -> reference answer.
    `no_proposals`: the aggregation prompt with empty slots -> target. `pseudo`: prompt and proposals -> an answer
    written without them (paper, Table 4)."""
    thinking: Literal["remove", "keep"] = "remove"
    """What happens to the teacher's thinking. `remove`: the student learns the answer only. `keep`: it learns the
    thinking too, as `<think>` ... `</think>` before the answer."""
    vary_num_proposals: tuple[int, int] | None = None
    """Smallest and largest number of proposals in an example; each prompt draws its own number. None: every example
    shows all selected proposals."""
    max_length: int = Field(default=4096, ge=16)
    """Largest number of tokens in an example, prompt and target together. `templates.length_policy` shortens the prompt
    if necessary; a target is never cut."""
    placement: PlacementConfig = PlacementConfig()
    """Number of actors, and the resources of each."""
