"""What `plan` assumes of a cluster before anything was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from aft_ray.config.strict import Strict

Gpu = Literal["A100", "B200", "H100", "H200", "L4", "L40S"]


class EstimateConfig(Strict):
    """The cluster, the lengths and the speeds from which `plan` computes hours and cost. They decide nothing else.

    A preview measures lengths and speeds; measured speeds go to `tokens_per_second`.
    """

    gpu: Gpu = "H100"
    """Kind of the GPUs: it decides the peak and the list price."""
    num_gpus: int = Field(default=8, ge=1)
    """GPUs of the cluster. A step uses as many as its workers ask for, and no more than these."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Number of prompts to plan for. None: `prompts.limit`, else `plan` counts the prompts, which reads their
    source."""
    prompt_tokens: int = Field(default=300, ge=1)
    """Mean length of a prompt."""
    answer_tokens: int = Field(default=500, ge=1)
    """Mean length of a proposal and of a target, where sampling does not end it earlier."""
    billions: Mapping[str, float] = Field(default_factory=dict)
    """Parameters in billions by model, where neither a local folder nor the name (`...-8B`) tells them."""
    generation_utilization: float = Field(default=0.2, gt=0, le=1)
    """Share of the GPU's peak that generating a full batch reaches; the peak is that of dense bfloat16."""
    reading_utilization: float = Field(default=0.4, gt=0, le=1)
    """The same for reading prompts and for scoring."""
    training_utilization: float = Field(default=0.35, gt=0, le=1)
    """The same for training."""
    tokens_per_second: Mapping[str, float] = Field(default_factory=dict)
    """Measured tokens per second and GPU by step, in place of a utilization. They count what is written in `proposals`,
    `targets` and `evaluate`, and what is read in `scores` and `train`."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU for an hour, in US dollars. None: `run.usd_per_gpu_hour`, else a list price of the GPU
    (pipeline/estimate.py)."""
