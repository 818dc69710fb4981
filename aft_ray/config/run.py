"""A whole run: one section per room, and what must fit between them."""

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
from aft_ray.config.serving import EvaluationConfig, ServingConfig
from aft_ray.config.strict import Strict
from aft_ray.config.templates import TemplatesConfig
from aft_ray.config.training import TrainingConfig


class RunSection(Strict):
    """Where a run lives and what it tolerates."""

    dir: str
    """Run folder. One folder holds one run; it is resumed or refused, never written over."""
    seed: int = 20250122
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of a stage's rows that may fail before the run stops with exit code 3."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU, for `plan`."""
    ray_address: str | None = None
    """Ray cluster; None: `RAY_ADDRESS` when set, else a local one for this run."""


class Config(Strict):
    """A whole run."""

    run: RunSection
    engine: EngineConfig
    """The model to be trained: proposals, evaluation and serving use it."""
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

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.selection.num_proposals > self.proposals.num_per_prompt:
            raise ValueError(
                f"selection.num_proposals {self.selection.num_proposals} > proposals.num_per_prompt "
                f"{self.proposals.num_per_prompt}: there are not that many to choose from. Raise num_per_prompt"
            )
        if "pseudo" in self.training_set.variants and not self.targets.pseudo:
            raise ValueError("training_set.variants has 'pseudo': set targets.pseudo to true, or leave the variant out")
        if self.prompts.responses is None and any(p.source == "off_policy" for p in self.proposals.proposers):
            raise ValueError("proposals.proposers has an off_policy one: name the answers' place in prompts.responses")
        if self.scores.scorer == "judge" and self.scores.judge is None:
            raise ValueError("scores.scorer is judge: name the judge's engine in scores.judge.engine")
        if self.targets.filters.worse_than_best and self.scores.scorer in {"judge", "likelihood"}:
            raise ValueError(
                f"targets.filters.worse_than_best: scores of the {self.scores.scorer} cannot be compared between a "
                "target and the proposals it was written from; use a verifier or a reward model, or switch it off"
            )
        for key, engine, placement in self._placed_engines():
            if engine.type == "vllm" and max(1, placement.num_gpus) != engine.tensor_parallel_size:
                raise ValueError(
                    f"{key}.placement.num_gpus {placement.num_gpus:g}, but its engine has tensor_parallel_size "
                    f"{engine.tensor_parallel_size}: a worker holds one engine and needs as many GPUs. Set them equal"
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
                "an example that does not fit a row would be cut. Raise pack_length"
            )
        if self.engine.type == "openai":
            raise ValueError(
                "engine.type openai cannot be trained: name a vllm or transformers engine; "
                "a remote teacher goes to targets.engine"
            )
        return self

    def _placed_engines(self) -> list[tuple[str, EngineConfig, PlacementConfig]]:
        """Every engine that a data stage starts in its workers: stage, engine, what a worker asks of the cluster."""
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
