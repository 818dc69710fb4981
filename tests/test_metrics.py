"""The metrics of stages and of training, as Ray exports them to Prometheus."""

from __future__ import annotations

import pytest

from aft_ray import metrics
from aft_ray.metrics import STAGES, TRAINING
from tests.serving.test_metrics import eventually, value


class Counting:
    """A process that counts what a stage and a training would."""

    def count(self) -> None:
        for _ in range(2):
            metrics.count_shard("counted", "scores", num_ok=7, num_failed=1, num_tokens=90, seconds=3.0)
        metrics.count_worker("counted", "scores", seconds=30.0)
        metrics.count_engine_death("counted", "scores")
        metrics.count_training_start("counted", "aft")
        for loss in (2.0, 1.5):
            row = {"loss": loss, "seconds": 0.7, "tokens": 400, "trained_tokens": 100, "grad_norm": 0.5}
            metrics.count_step("counted", "aft", row)


@pytest.fixture(scope="module")
def page(ray_cluster: None) -> str:
    import ray

    counting = ray.remote(num_cpus=0)(Counting).remote()
    ray.get(counting.count.remote())
    return eventually(lambda page: value(page, "aft_train_steps_total", run="counted") == 2)


def test_rows_tokens_and_shards_are_counted_by_stage(page: str) -> None:
    labels = {"run": "counted", "stage": "scores"}
    assert value(page, "aft_rows_total", outcome="ok", **labels) == 14
    assert value(page, "aft_rows_total", outcome="failed", **labels) == 2
    assert value(page, "aft_stage_tokens_total", **labels) == 180
    assert value(page, "aft_shards_total", **labels) == 2
    assert value(page, "aft_shard_seconds_bucket", le="2.5", **labels) == 0
    assert value(page, "aft_shard_seconds_bucket", le="5.0", **labels) == 2
    assert value(page, "aft_workers_started_total", **labels) == value(page, "aft_engine_deaths_total", **labels) == 1


def test_steps_are_counted_by_variant(page: str) -> None:
    labels = {"run": "counted", "variant": "aft"}
    assert value(page, "aft_train_loss", **labels) == 1.5
    assert value(page, "aft_train_tokens_total", kind="all", **labels) == 800
    assert value(page, "aft_train_tokens_total", kind="in_loss", **labels) == 200
    assert value(page, "aft_train_step_seconds_count", **labels) == 2


def test_every_metric_appears_under_its_name(page: str) -> None:
    suffixes = {"histogram": "_bucket"}
    for name, definition in (STAGES | TRAINING).items():
        assert f"ray_{name}{suffixes.get(definition.kind, '')}{{" in page, name
