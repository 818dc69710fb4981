"""What each step of a run asks of a cluster: workers, and the CPUs and GPUs of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from aft_ray.config import Config, PlacementConfig, gpus_of
from aft_ray.data.proposals import parts
from aft_ray.data.scorers import gpus_of_scorer


@dataclass(frozen=True, kw_only=True)
class Need:
    """The workers of one step."""

    step: str
    key: str
    """The setting that asks for them."""
    least: int
    """Workers that must run at a time."""
    most: int
    num_cpus: float
    num_gpus: float | None
    """GPUs per worker as they are set. None: `engine_gpus` where the cluster has GPUs, else none."""
    engine_gpus: int
    accelerator_type: str | None


def needs(config: Config) -> Iterator[Need]:
    """Yield the needs of every step that has workers of its own, in order."""
    if config.makes_targets:
        for part in parts(config.proposals):
            own = f"proposals.proposers.{part.index}.placement" if config.proposals.proposers else "proposals.placement"
            sampled = part.proposer.source == "on_policy"
            gpus = gpus_of(part.proposer.engine or config.engine) if sampled else 0
            yield _of_placement(part.stage_name, own, part.proposer.placement, gpus)
        yield _of_placement("scores", "scores.placement", config.scores.placement, gpus_of_scorer(config))
        yield _of_placement("selection", "selection.placement", config.selection.placement, 0)
        teacher = gpus_of(config.targets.engine or config.engine) if config.targets.source == "teacher" else 0
        yield _of_placement("targets", "targets.placement", config.targets.placement, teacher)
    yield _of_placement("training_set", "training_set.placement", config.training_set.placement, 0)
    training = config.training
    yield Need(
        step="train",
        key="training",
        least=training.num_workers,
        most=training.num_workers,
        num_cpus=training.cpus_per_worker,
        num_gpus=training.gpus_per_worker,
        engine_gpus=1,
        accelerator_type=training.accelerator_type,
    )
    for key, engine, replicas in config.serving.pools:
        yield Need(
            step="evaluate",
            key=f"serving.{key}",
            least=max(1, replicas.min_replicas),
            most=replicas.max_replicas,
            num_cpus=replicas.num_cpus,
            num_gpus=replicas.num_gpus,
            engine_gpus=gpus_of(engine or config.engine),
            accelerator_type=replicas.accelerator_type,
        )


def _of_placement(step: str, key: str, placement: PlacementConfig, engine_gpus: int) -> Need:
    return Need(
        step=step,
        key=key,
        least=1,
        most=placement.max_actors,
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus,
        engine_gpus=engine_gpus,
        accelerator_type=placement.accelerator_type,
    )
