"""What the evaluation asks of an endpoint, and of the targets."""

from __future__ import annotations

from pydantic import Field, model_validator

from aft_ray.config.data import PromptsConfig
from aft_ray.config.strict import PlanField, Strict
from aft_ray.inference.plan import Plan


class SystemConfig(Strict):
    """One system to evaluate: a served model with a plan."""

    name: str
    """Name in metrics and report, and of the folder with the answers."""
    model: str
    """Model name at the endpoint, such as `aft`. A suffix changes the plan's width and depth: `aft@k3-l2`,
    `aft@single`."""
    plan: PlanField | None = None
    """Plan of this system. None: the evaluation's plan."""


class EvaluationConfig(Strict):
    """The systems to evaluate, and how."""

    prompts: PromptsConfig | None = None
    """Prompts to ask in place of the run's held-out ones: a source with its columns, task and limit, as in `prompts`.
    All that are kept are asked. None: the held-out prompts. Name the source in `prompts.decontaminate` too, so that no
    prompt of it is trained on."""
    base_url: str | None = None
    """Endpoint to evaluate. None: this run is served while the evaluation lasts, for callers in the cluster only."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key of `base_url`. Every node needs it."""
    systems: tuple[SystemConfig, ...] | None = None
    """Systems to compare. None: every model of the run, with `plan`."""
    plan: PlanField = Plan()
    """Plan of systems that set none."""
    single: bool = False
    """Whether every model also answers once, without aggregation (L=0), as a system `<model>-single`. It samples as the
    final layer of `plan` does. Useful if proposals have another sampling."""
    max_concurrency: int = Field(default=8, ge=1)
    """Number of prompts in flight."""
    num_bootstrap: int = Field(default=2000, ge=100)
    """Number of bootstrap samples behind an interval."""

    @model_validator(mode="after")
    def _asks_all_prompts(self) -> EvaluationConfig:
        for name in ONLY_OF_TRAINING:
            default = PromptsConfig.model_fields[name].default
            if self.prompts is not None and getattr(self.prompts, name) != default:
                raise ValueError(
                    f"prompts.{name}: all prompts of this set are asked, and none is trained on; leave it out"
                )
        return self


ONLY_OF_TRAINING = ("held_out", "responses", "decontaminate", "decontaminate_ngram")
"""Settings of prompts that decide what is trained on."""
