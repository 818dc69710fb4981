"""One stage of a run: a pool of Ray Data actors turns the shards of its source into shards of its output.

One actor makes a whole shard (shards.py). It works on the rows of several shards at once, so that the batch of its
engine stays full and a slow row delays its own shard only. A stage that was killed reads from its output which rows are
missing, and continues with those.

    proposals/shard-00007.parquet -> [actor: worker.process(row) for each row] -> scores/shard-00007.parquet
                                                                 failures -> scores/failed/shard-00007.jsonl
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from aft_ray.errors import ERRORS, AftError, ConfigError, InputError, TooManyFailures
from aft_ray.progress import Progress
from aft_ray.runs import Manifest, begin, read_manifest, write_manifest
from aft_ray.shards import RowWorker, Stage, list_failures, make_shard, read_receipt


def run_stage(
    stage: Stage,
    *,
    max_failure_rate: float,
    retry_failed: bool = False,
    connect: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make the rows of `stage.source` that `stage.output` lacks, and return the finished manifest.

    With `retry_failed`, rows that failed before are tried again. `connect` is called before Ray is used, and not at all
    when no row is missing. Raises ResumeRefused (the folder was made from other settings), InputError (the source is
    not finished), TooManyFailures, ConfigError (a worker fits on no node), or the error of a worker that could not be
    built.
    """
    source = read_manifest(stage.source)
    if source is None or source.status != "done":
        raise InputError(f"{stage.source.path}: this stage is not finished, and '{stage.name}' reads it. Run it first")
    manifest = begin(stage.output, stage.name, {**stage.settings, "source": source.fingerprint})
    is_complete = manifest.status == "done" and manifest.rows_in == source.rows_out
    if is_complete and not (retry_failed and manifest.num_failed):
        return manifest
    manifest = dataclasses.replace(manifest, status="running")
    write_manifest(stage.output, manifest)
    todo, num_rows_done = _todo(stage, retry_failed)
    started = time.monotonic()
    if todo:
        connect()
        busy = 0.0
        try:
            busy = _make_shards(stage, todo, num_rows_done, source.rows_out, max_failure_rate, retry_failed)
        finally:
            manifest = dataclasses.replace(
                manifest,
                seconds=round(manifest.seconds + time.monotonic() - started, 1),
                busy_seconds=round(manifest.busy_seconds + busy, 1),
            )
            write_manifest(stage.output, manifest)
    return _finish(stage, manifest, max_failure_rate)


def _todo(stage: Stage, retry_failed: bool) -> tuple[list[str], int]:
    """Return the shards that lack rows, and the number of rows that are complete."""
    there = set(stage.output.names(".parquet"))
    todo, num_rows_done = [], 0
    for name in stage.source.names(".parquet"):
        if name not in there:
            todo.append(name)
            continue
        receipt = read_receipt(stage.output, name)
        num_retried = len(receipt.failed) if retry_failed else 0
        num_rows_done += receipt.rows_in - num_retried
        if num_retried or receipt.rows_in < stage.source.num_rows(name):
            todo.append(name)
    return todo, num_rows_done


def _make_shards(
    stage: Stage, shards: list[str], num_rows_done: int, num_rows: int, max_failure_rate: float, retry_failed: bool
) -> float:
    """Make the named shards in a pool of actors, which write them; return the seconds that a worker was ready."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _check_placement(stage)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    on_this_node: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}  # it survives the loss of other nodes
    counter: Any = ray.remote(**on_this_node)(_Counter).remote()
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    in_flight = stage.placement.max_shards_in_flight
    receipts = dataset.map(
        _ShardActor,  # type: ignore[arg-type] # an async callable class is allowed
        fn_constructor_args=(stage, counter, retry_failed),
        compute=ray.data.ActorPoolStrategy(
            min_size=min(stage.placement.min_actors, len(shards)),
            max_size=min(stage.placement.max_actors, len(shards)),
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
        num_cpus=stage.placement.num_cpus,
        num_gpus=stage.placement.num_gpus or None,
        accelerator_type=stage.placement.accelerator_type,
    )
    with Progress(stage.name, total=num_rows) as progress, _ProgressThread(counter, progress, num_rows_done) as shown:
        failed = 0
        for receipt in receipts.iter_rows():
            if receipt["error"]:
                raise ERRORS[receipt["error"]](f"{stage.name}: {receipt['message']}")
            failed += receipt["num_failed"]
            if failed > max_failure_rate * num_rows:
                break  # _finish counts exactly and stops the run
        return shown.update()


class _ProgressThread:
    """A thread that copies the counts of the actors into the progress line while the driver waits for shards.

    It ends the actor that counts when the stage is over.
    """

    def __init__(self, counter: Any, progress: Progress, already: int) -> None:
        self.counter, self.progress, self.already = counter, progress, already
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def update(self) -> float:
        import ray

        counts = ray.get(self.counter.read.remote())
        note = "" if counts["ready"] else "starting workers"
        done = counts["rows"] + self.already
        self.progress.update(done=done, failed=counts["failed"], tokens=counts["tokens"], note=note)
        return float(counts["busy_seconds"])

    def _poll(self) -> None:
        while not self.stop.wait(1.0):
            self.update()

    def __enter__(self) -> _ProgressThread:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self.stop.set()
        self.thread.join()
        ray.kill(self.counter)  # the data set holds it too, and would keep its process to the end of the run


def _check_placement(stage: Stage) -> None:
    """Raise ConfigError for a worker that fits on no node and would wait for ever. An autoscaling cluster may grow."""
    import ray

    placement = stage.placement
    wanted = {"CPU": placement.num_cpus, "GPU": placement.num_gpus}
    if placement.accelerator_type is not None:
        wanted[f"{ACCELERATOR}{placement.accelerator_type}"] = 0.001  # what Ray asks of the label
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in nodes)
    if not fits and not any(has.get("aft_autoscaling") for has in nodes):
        raise ConfigError(
            f"{stage.name}.placement requests {_shown(wanted)} per worker, and no node has that. "
            f"The nodes have: {'; '.join(sorted(map(_shown, nodes)))}. Request less or use a larger cluster"
        )


ACCELERATOR = "accelerator_type:"


def _shown(resources: Mapping[str, float]) -> str:
    """Return resources in words: `4 CPU, 2 GPU, H100`."""
    amounts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join([*amounts, *(name.removeprefix(ACCELERATOR) for name in resources if ACCELERATOR in name)])


class _Counter:
    """An actor that counts the finished rows of a stage, for its progress line only."""

    def __init__(self) -> None:
        self.counts = {"rows": 0, "failed": 0, "tokens": 0, "ready": 0}
        self.first_ready: float | None = None

    def add(self, rows: int, failed: int, tokens: int) -> None:
        self.counts["rows"] += rows
        self.counts["failed"] += failed
        self.counts["tokens"] += tokens

    def ready(self) -> None:
        self.counts["ready"] += 1
        self.first_ready = self.first_ready or time.monotonic()

    def read(self) -> dict[str, float]:
        busy = time.monotonic() - self.first_ready if self.first_ready else 0.0
        return {**self.counts, "busy_seconds": busy}


class _ShardActor:
    """An actor that holds one worker and makes several shards at a time with it, on one event loop."""

    def __init__(self, stage: Stage, counter: Any, retry_failed: bool) -> None:
        self.stage, self.counter, self.retry_failed = stage, counter, retry_failed
        self.worker: RowWorker | None = None
        self.building = asyncio.Lock()

    async def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            worker = await self._worker()
            receipt = await make_shard(self.stage, item["shard"], worker, self._count, self.retry_failed)
        except AftError as error:  # returned as data: Ray would wrap it in pages of its own traceback
            return {"num_failed": 0, "error": type(error).__name__, "message": str(error)}
        return {"num_failed": len(receipt.failed), "error": "", "message": ""}

    async def _worker(self) -> RowWorker:
        async with self.building:
            if self.worker is None:
                self.worker = self.stage.worker()
                self.counter.ready.remote()
            return self.worker

    def _count(self, failed: int, tokens: int) -> None:
        self.counter.add.remote(1, failed, tokens)


def _finish(stage: Stage, manifest: Manifest, max_failure_rate: float) -> Manifest:
    names = stage.output.names(".parquet")
    failed: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    first_failure = ""
    totals: dict[str, Any] = dict.fromkeys(TOTALS, 0)
    for name in names:
        receipt = read_receipt(stage.output, name)
        list_failures(stage, name, receipt)  # once more, in case a kill came between the shard and its list
        failed.update(why["error"] for why in receipt.failed.values())
        first_failure = first_failure or next((why["message"] for why in receipt.failed.values()), "")
        filtered.update(receipt.filtered.values())
        totals = {field: total + getattr(receipt, field) for field, total in totals.items()}
    manifest = dataclasses.replace(manifest, failed=dict(failed), filtered=dict(filtered), **totals)
    if manifest.num_failed > max_failure_rate * manifest.rows_in:
        write_manifest(stage.output, manifest)
        reasons = ", ".join(f"{count} {error}" for error, count in failed.most_common())
        raise TooManyFailures(
            f"{stage.name}: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {max_failure_rate:g} allows. The first: {first_failure}. Reasons by row: "
            f"{stage.output.path}/failed; to try these rows again: aft-ray run --retry-failed"
        )
    manifest = dataclasses.replace(manifest, status="done", files={name: stage.output.sha256(name) for name in names})
    write_manifest(stage.output, manifest)
    return manifest


TOTALS = ("rows_in", "rows_out", "prompt_tokens", "completion_tokens", "cost_usd")
"""Fields of the receipts whose sums go into the manifest."""
