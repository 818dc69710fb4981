"""A whole run: one section per stage, and the checks between sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from aft_ray.config.data import (
    PromptsConfig,
    ProposalsConfig,
    ScoresConfig,
    SelectionConfig,
    TargetsConfig,
    TrainingSetConfig,
)
from aft_ray.config.engines import EngineConfig, PlacementConfig
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
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of the rows of a stage that may fail before the run stops with exit code 3."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU, from which `plan` computes the cost."""
    ray_address: str | None = None
    """Address of the Ray cluster. None takes `RAY_ADDRESS` where it is set, else starts a cluster for this run."""


class Config(Strict):
    """The configuration of a whole run."""

    run: RunSection
    engine: EngineConfig
    """The model to be trained. Proposals, evaluation and serving use it too."""
    templates: TemplatesConfig = TemplatesConfig()
    prompts: PromptsConfig = PromptsConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    scores: ScoresConfig = ScoresConfig()
    selection: SelectionConfig = SelectionConfig()
    targets: TargetsConfig = TargetsConfig()
    training_set: TrainingSetConfig = TrainingSetConfig()
    training: TrainingConfig = TrainingConfig()
    serving: ServingConfig = ServingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    miniature: str | None = None
    """YAML of a study of the method on the miniature, which runs in this run's folder; its answer opens the report.
    None for no study."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.selection.num_proposals > self.proposals.num_per_prompt:
            raise ValueError(
                f"selection.num_proposals {self.selection.num_proposals} > proposals.num_per_prompt "
                f"{self.proposals.num_per_prompt}: a selection cannot keep more than there are. Raise num_per_prompt"
            )
        if "pseudo" in self.training_set.variants and not self.targets.pseudo:
            raise ValueError(
                "training_set.variants includes 'pseudo': set targets.pseudo to true, or leave the variant out"
            )
        if self.prompts.responses is None and any(p.source == "off_policy" for p in self.proposals.proposers):
            raise ValueError(
                "proposals.proposers includes an off_policy one: set prompts.responses to the source of its answers"
            )
        if self.targets.filters.worse_than_best and self.scores.scorer in {"judge", "likelihood"}:
            raise ValueError(
                f"targets.filters.worse_than_best: scores of the {self.scores.scorer} cannot be compared between a "
                "target and the proposals it was written from. Use a verifier or a reward model, or set it to null"
            )
        for key, engine, placement in self._placed_engines():
            if engine.type == "vllm" and max(1, placement.num_gpus) != engine.tensor_parallel_size:
                raise ValueError(
                    f"{key}.placement.num_gpus {placement.num_gpus:g}, but its engine has tensor_parallel_size "
                    f"{engine.tensor_parallel_size}: each worker holds one engine and needs as many GPUs. "
                    "Set them equal"
                )
        varied = self.training_set.vary_num_proposals
        if varied and not 1 <= varied[0] <= varied[1] <= self.selection.num_proposals:
            raise ValueError(
                f"training_set.vary_num_proposals {list(varied)}: expected 1 <= smallest <= largest <= "
                f"selection.num_proposals {self.selection.num_proposals}"
            )
        pack_length = self.training.pack_length
        if pack_length is not None and pack_length < self.training_set.max_length:
            raise ValueError(
                f"training.pack_length {pack_length} < training_set.max_length {self.training_set.max_length}: "
                "an example that is longer than a row would be cut. Raise pack_length"
            )
        if self.engine.type == "openai":
            raise ValueError(
                "engine.type openai cannot be trained: set engine to a vllm or transformers engine, and "
                "targets.engine to the remote teacher"
            )
        return self

    def _placed_engines(self) -> list[tuple[str, EngineConfig, PlacementConfig]]:
        """Return every engine that a data stage starts in its workers: stage, engine and placement."""
        placed = [
            ("proposals", proposer.engine or self.engine, proposer.placement)
            for proposer in self.proposals.all_proposers
            if proposer.source == "on_policy"
        ]
        if self.targets.source == "teacher":
            placed.append(("targets", self.targets.engine or self.engine, self.targets.placement))
        if self.scores.scorer == "judge" and self.scores.judge is not None:
            placed.append(("scores", self.scores.judge.engine, self.scores.placement))
        if self.scores.scorer == "likelihood":
            placed.append(("scores", self.scores.likelihood.engine or self.engine, self.scores.placement))
        return placed
