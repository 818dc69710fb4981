"""A whole run: one section per stage. The conditions between sections are in `conditions.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.conditions import problems
from aft_ray.config.data import (
    PromptsConfig,
    ProposalsConfig,
    ScoresConfig,
    SelectionConfig,
    TargetsConfig,
    TrainingSetConfig,
)
from aft_ray.config.engines import EngineConfig
from aft_ray.config.estimate import EstimateConfig
from aft_ray.config.evaluation import EvaluationConfig
from aft_ray.config.serving import ServingConfig
from aft_ray.config.strict import Strict
from aft_ray.config.templates import TemplatesConfig
from aft_ray.config.training import TrainingConfig


class RunSection(Strict):
    """The folder, the seed and the limits of a run."""

    dir: str
    """Run folder. One folder holds one run, which is resumed or refused, never overwritten."""
    seed: int = 20250122
    """Seed from which those of all prompts, layers and samples are derived."""
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of the rows of a stage that may fail before the run stops with exit code 3. With 1 the run continues even
    if no row can be used."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU, from which `plan` computes the cost."""
    ray_address: str | None = None
    """Address of the Ray cluster. None takes `RAY_ADDRESS` where it is set, else starts a cluster for this run."""
    log_format: Literal["text", "json"] = "text"
    """Format of the workers' logs. `json`: one object per line with run, stage, prompt_id and Ray's ids of job, node,
    worker and task."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that every worker must have, such as `HF_TOKEN`. The keys of remote endpoints
    (`api_key_env`) are always among them. Values are read where they are used; they neither travel nor are logged."""
    environment_file: str | None = None
    """File that every node has, with lines `NAME=VALUE`: where workers find variables that their own environment lacks.
    For example a mounted secret, `/run/secrets/aft_ray.env`."""


class Config(Strict):
    """The configuration of a whole run."""

    run: RunSection
    """Folder, seed and limits."""
    engine: EngineConfig
    """The model to be trained. Proposals, evaluation and serving use it too."""
    templates: TemplatesConfig = TemplatesConfig()
    """The templates around prompts and proposals."""
    prompts: PromptsConfig = PromptsConfig()
    """Where prompts come from."""
    proposals: ProposalsConfig = ProposalsConfig()
    """How drafts are made."""
    scores: ScoresConfig = ScoresConfig()
    """How drafts are scored."""
    selection: SelectionConfig = SelectionConfig()
    """Which drafts are kept."""
    targets: TargetsConfig = TargetsConfig()
    """How the answers to learn from are made."""
    training_set: TrainingSetConfig = TrainingSetConfig()
    """What becomes of them as token ids."""
    training: TrainingConfig = TrainingConfig()
    """Fine-tuning."""
    serving: ServingConfig = ServingConfig()
    """The endpoint."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is evaluated, and how."""
    estimate: EstimateConfig = EstimateConfig()
    """What `plan` assumes."""
    miniature: str | None = None
    """YAML of a study of the method on the miniature, which runs in this run's folder; its answer opens the report.
    None for no study."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        found = problems(self)
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def makes_targets(self) -> bool:
        """Whether proposals and targets are made. Otherwise the prompts' own answers are trained on."""
        return self.training_set.source == "targets"

    @property
    def scores_targets(self) -> bool:
        """Whether targets get scores, in the stage `target_scores`: to choose among candidates, or for a filter."""
        targets = self.targets
        if not self.makes_targets:
            return False
        is_choice = targets.source == "teacher" and targets.keep == "best" and targets.num_candidates > 1
        return self.scores.scorer != "none" and (is_choice or targets.filters.worse_than_best)
