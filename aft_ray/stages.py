"""One stage of a run: a pool of Ray Data actors turns the shards of its source into shards of its output.

One actor makes a whole shard (shards.py, stage_workers.py). It works on the rows of several shards at once, so that the
batch of its engine stays full and a slow row delays its own shard only. A stage that was killed reads from its output
which rows are missing, and continues with those.

    proposals/shard-00007.parquet -> [actor: worker.process(row) for each row] -> scores/shard-00007.parquet
                                                                 failures -> scores/failed/shard-00007.jsonl

The driver keeps a summary of each shard and no row. A small stage whose workers load no model is made by the driver
itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

from aft_ray.cluster_fit import check_fits, resources_of_worker
from aft_ray.config import PlacementConfig
from aft_ray.errors import AftError, InputError, ResumeRefused, TooManyFailures
from aft_ray.fan_in import Emit, fan_in
from aft_ray.gpus import num_gpus_of
from aft_ray.progress import Progress
from aft_ray.records import fingerprint
from aft_ray.runs import Manifest, begin, read_manifest, write_manifest
from aft_ray.shards import (
    ShardSummary,
    Stage,
    changed_rows,
    list_failures,
    read_receipt,
    summary_of,
)
from aft_ray.stage_attempt import Attempt, ProgressThread
from aft_ray.stage_workers import Outcome, Roster, ShardActor, ShardMaker

READERS = 16
"""Threads that read footers, which wait for the storage."""
ROWS_IN_DRIVER = 2048
"""Rows up to which the driver makes a light stage itself. Actors need 2 to 3 seconds to start, and more on a busy
machine (benchmarks/stage_start.py); in that time one process makes some 5,000 rows (benchmarks/scale.py)."""


def run_stage(
    stage: Stage,
    *,
    max_failure_rate: float,
    retry_failed: bool = False,
    connect: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make the rows of `stage.source` that `stage.output` lacks, and return the finished manifest.

    With `retry_failed`, rows that failed before are tried again. `connect` is called before Ray is used, and not at all
    when no row is missing. Raises ResumeRefused (the folder was made from other settings or other rows), InputError
    (the source is not finished), TooManyFailures, ConfigError (a worker fits on no node), EngineError (the engine died
    again and again), or the error of a worker that could not be built.
    """
    source = read_manifest(stage.source)
    if source is None or source.status != "done":
        raise InputError(
            f"{stage.source.location}: this stage is not finished, and '{stage.name}' reads it. Run it first"
        )
    manifest = _begin(stage, source)
    is_complete = manifest.status == "done" and manifest.rows_in == source.rows_out
    is_complete &= manifest.source_content in {fingerprint(source.files), None}  # None: made by an earlier version
    if is_complete and not (retry_failed and manifest.num_failed):
        return manifest
    todo, there = _todo(stage, source, retry_failed)
    attempt = Attempt(stage, manifest, there, todo, source.rows_out, retry_failed)
    attempt.write()
    if todo:
        connect()
        is_small = stage.is_light and attempt.num_rows - attempt.already <= ROWS_IN_DRIVER
        try:
            if is_small:
                asyncio.run(_make_in_driver(attempt, todo, max_failure_rate))
            else:
                _make_in_actors(attempt, todo, max_failure_rate)
        finally:
            attempt.write()
    return _finish(attempt, max_failure_rate, source)


def check_settings(stage: Stage) -> None:
    """Raise ResumeRefused where the folder of a stage was made from other settings than it would be made from now."""
    source = read_manifest(stage.source)
    if source is not None and read_manifest(stage.output) is not None:
        _begin(stage, source)


def _begin(stage: Stage, source: Manifest) -> Manifest:
    return begin(stage.output, stage.name, {**stage.settings, "source": source.fingerprint})


def _todo(stage: Stage, source: Manifest, retry_failed: bool) -> tuple[list[str], dict[str, ShardSummary]]:
    """Return the shards that lack rows, and the summaries of all shards that are there.

    It also writes the lists of failures once more, in case a kill came between a shard and its list. Raises
    ResumeRefused where the source no longer holds the rows that a shard was made from.
    """
    there = set(stage.output.names(".parquet"))
    listed = set(stage.output.child("failed").names())

    def read(name: str) -> tuple[ShardSummary, bool]:
        receipt = read_receipt(stage.output, name)
        if receipt.failed or name.replace(".parquet", ".jsonl") in listed:
            list_failures(stage, name, receipt)
        if name not in names:
            raise ResumeRefused(_other_rows(stage, name, list(receipt.source_rows)))
        if receipt.source_sha256 not in {source.files.get(name), None}:
            changed = changed_rows(stage.source, name, receipt)
            if changed:
                raise ResumeRefused(_other_rows(stage, name, changed))
        lacks_rows = bool(retry_failed and receipt.failed) or receipt.rows_in < stage.source.num_rows(name)
        return summary_of(name, receipt, None), lacks_rows

    names = stage.source.names(".parquet")
    with ThreadPoolExecutor(READERS) as readers:
        found = dict(zip(there, readers.map(read, there), strict=True))
    todo = [name for name in names if name not in found or found[name][1]]
    return todo, {name: summary for name, (summary, _) in found.items()}


def _other_rows(stage: Stage, name: str, prompt_ids: Sequence[str]) -> str:
    return (
        f"{stage.output.location}/{name} was made from rows that {stage.source.location}/{name} does not hold any more "
        f"({len(prompt_ids)} of them, such as {', '.join(prompt_ids[:3])}). Remove the folder {stage.output.name}/ and "
        "the ones made from it, to make them again"
    )


async def _make_in_driver(attempt: Attempt, todo: Sequence[str], max_failure_rate: float) -> None:
    """Make the named shards in this process, as many at a time as an actor would."""
    import ray

    stage, node = attempt.stage, ray.get_runtime_context().get_node_id()
    maker = ShardMaker(stage, attempt.retry_failed)
    places = asyncio.Semaphore(stage.placement.max_shards_in_flight)

    async def make(name: str, emit: Emit[ShardSummary]) -> None:
        async with places:
            emit(await maker.make(name))

    async def keep_showing(progress: Progress) -> None:
        while True:
            attempt.show(progress, open_shards=maker.open, working_s=maker.ready_s)
            await asyncio.sleep(1.0)

    with Progress(stage.name, total=attempt.num_rows) as progress:
        shown = asyncio.create_task(keep_showing(progress))
        try:
            async with aclosing(fan_in([partial(make, name) for name in todo])) as shards:
                async for made in shards:
                    attempt.add(Outcome(made=made, worker="driver", node=node, ready_s=maker.ready_s or 0.0), made)
                    if attempt.fails_too_often(max_failure_rate):
                        break
        except AftError as error:
            raise _of(stage, error) from error
        finally:
            shown.cancel()
            await maker.close()
        attempt.show(progress, working_s=maker.ready_s)


def _of(stage: Stage, error: AftError) -> AftError:
    """Return an error of a worker with the name of its stage."""
    return type(error)(f"{stage.name}: {error}")


def _make_in_actors(attempt: Attempt, todo: Sequence[str], max_failure_rate: float) -> None:
    """Make the named shards in a pool of actors, which write them."""
    import ray

    stage, placement = attempt.stage, attempt.stage.placement
    attempt.gpus_per_worker = num_gpus = num_gpus_of(placement.num_gpus, stage.gpus)
    wanted = resources_of_worker(placement.num_cpus, num_gpus, placement.accelerator_type)
    check_fits(f"{stage.name}.placement", wanted)
    roster: Any = ray.remote(num_cpus=0, max_restarts=-1)(Roster).remote()
    with ray.data.DataContext.current(_settings_of_ray_data()):
        dataset = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    outcomes = dataset.map(
        ShardActor,  # type: ignore[arg-type] # an async callable class is allowed
        fn_constructor_args=(stage, roster, attempt.retry_failed),
        compute=_pool(placement, len(todo)),
        num_cpus=placement.num_cpus,
        num_gpus=num_gpus or None,
        accelerator_type=placement.accelerator_type,
    )
    with (
        Progress(stage.name, total=attempt.num_rows) as progress,
        ProgressThread(attempt, progress, roster),
    ):
        # `iter_rows` gives a row out when the next one is there, and shards may be minutes apart
        batches: Iterable[Any] = outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for pickled in itertools.chain.from_iterable(batch["outcome"].to_pylist() for batch in batches):
            outcome: Outcome = pickle.loads(pickled)
            if isinstance(outcome.made, AftError):
                raise _of(stage, outcome.made)
            attempt.add(outcome, outcome.made)
            if attempt.fails_too_often(max_failure_rate):
                break


def _pool(placement: PlacementConfig, num_shards: int) -> Any:
    """Return a pool of as many actors as have work. It grows with the cluster and gives idle actors back.

    More tasks than calls at a time would keep an actor's queue filled, but leave shards waiting behind a busy actor
    that another one could make.
    """
    import ray

    most = min(placement.max_actors, num_shards)
    least = min(placement.min_actors, num_shards)
    return ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        initial_size=min(max(math.ceil(num_shards / placement.max_shards_in_flight), least), most),
        max_tasks_in_flight_per_actor=placement.max_shards_in_flight,
        max_concurrent_calls_per_actor=placement.max_shards_in_flight,
    )


def _settings_of_ray_data() -> Any:
    """Return a Ray Data context for stages, whose blocks are names of shards and whose work takes minutes to hours."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    # Utilisation is tasks in flight over concurrent calls, so 1 means that every actor is busy (Ray's default is 1.75).
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # Ray ends an execution without a finished block for 30 minutes. A large model may take longer to load, or a node to
    # come.
    context.execution_no_progress_timeout_s = -1
    return context


def _finish(attempt: Attempt, max_failure_rate: float, source: Manifest) -> Manifest:
    stage, manifest = attempt.stage, attempt.manifest()
    if manifest.num_failed > max_failure_rate * manifest.rows_in:
        reasons = ", ".join(f"{count} {error}" for error, count in Counter(manifest.failed).most_common())
        raise TooManyFailures(
            f"{stage.name}: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {max_failure_rate:g} allows. The first: {attempt.first_failure}. Reasons by row: "
            f"{stage.output.location}/failed; to try these rows again: aft-ray run --retry-failed"
        )
    _check_use(attempt, manifest, max_failure_rate)
    # Workers hash what they write. The files of a driver that was killed before it heard of them are read here.
    files = {name: manifest.files.get(name) or stage.output.sha256(name) for name in sorted(attempt.shards)}
    manifest = dataclasses.replace(manifest, status="done", files=files, source_content=fingerprint(source.files))
    write_manifest(stage.output, manifest)
    return manifest


def _check_use(attempt: Attempt, manifest: Manifest, max_failure_rate: float) -> None:
    """Raise TooManyFailures where no row is of use to what follows. A run that allows every failure goes on."""
    left_out = Counter(manifest.filtered) + Counter(manifest.unusable)
    is_useful = not left_out or manifest.rows_out > sum(manifest.unusable.values())
    if is_useful or max_failure_rate >= 1 or not attempt.stage.must_yield:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    first = f" The first: {attempt.first_unusable}." if ": " in attempt.first_unusable else ""
    raise TooManyFailures(
        f"{attempt.stage.name}: none of {manifest.rows_in} rows is usable ({reasons}).{first} "
        f"The output is in {attempt.stage.output.location}; with run.max_failure_rate 1 the run continues anyway"
    )
