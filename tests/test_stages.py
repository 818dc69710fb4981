"""The stage runner on a real local Ray: every row exactly once, failures as data, exact resume after SIGKILL."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError, EngineDead, EngineError, InputError, ResumeRefused, TooManyFailures
from aft_ray.runs import Manifest, read_manifest, write_manifest
from aft_ray.shards import Processed, RowWorker, Stage, write_first_shards
from aft_ray.stages import run_stage
from aft_ray.storage import Folder

NUMBERS = pa.schema([("prompt_id", pa.string()), ("number", pa.int64())])
SQUARES = NUMBERS.append(pa.field("square", pa.int64()))


class Squarer(RowWorker):
    """Squares `number`; refuses those in `bad`; takes `seconds` per row; dies (its engine did) when `broken`.

    `slow_until`: row 0 takes until a folder has so many shards; `pid_file` gets the process it runs in.
    """

    def __init__(
        self,
        bad: tuple[int, ...] = (),
        seconds: float = 0.0,
        broken: bool = False,
        slow_until: tuple[Path, int] | None = None,
        pid_file: Path | None = None,
    ) -> None:
        self.bad, self.seconds, self.broken, self.slow_until = bad, seconds, broken, slow_until
        if pid_file is not None:
            pid_file.write_text(str(os.getpid()))

    async def process(self, row: dict[str, Any]) -> Processed:
        await asyncio.sleep(self.seconds)
        if self.slow_until is not None and row["number"] == 0:
            folder, num_files = self.slow_until
            async with asyncio.timeout(60):
                while len(list(folder.glob("*.parquet"))) < num_files:  # noqa: ASYNC110 (files have no event)
                    await asyncio.sleep(0.05)
        if row["number"] in self.bad or self.broken:
            raise InputError(f"{row['number']} cannot be squared here")
        return Processed(rows=[{**row, "square": row["number"] ** 2}], completion_tokens=1)

    async def check(self) -> None:
        if self.broken:
            raise EngineError("the worker is broken")


class Build:
    """Return a factory that can be pickled."""

    def __init__(self, **knobs: Any) -> None:
        self.knobs = knobs

    def __call__(self) -> Squarer:
        return Squarer(**self.knobs)


def source(folder: Folder, num_rows: int = 20) -> Folder:
    rows = ({"prompt_id": f"p-{n}", "number": n} for n in range(num_rows))
    write_first_shards(folder, rows, NUMBERS, rows_per_shard=3)
    done = Manifest(stage="numbers", status="done", fingerprint="f", settings={}, rows_in=num_rows, rows_out=num_rows)
    write_manifest(folder, done)
    return folder


@pytest.fixture(params=[False, True], ids=["actors", "driver"])
def is_light(request: pytest.FixtureRequest) -> bool:
    """Whether a stage is light: a small one is then made by the driver."""
    return bool(request.param)


def squares(tmp_path: Path, settings: dict[str, Any] | None = None, is_light: bool = False, **knobs: Any) -> Stage:
    return Stage(
        name="squares",
        source=Folder.at(tmp_path / "numbers"),
        output=Folder.at(tmp_path / "squares"),
        schema=SQUARES,
        settings=settings or {},
        worker=Build(**knobs),
        placement=PlacementConfig(num_cpus=1, max_shards_in_flight=2),
        is_light=is_light,
    )


def test_every_row_comes_out_exactly_once_and_in_its_own_shard(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    numbers = source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path, is_light=is_light)
    manifest = run_stage(stage, max_failure_rate=0)
    assert [row["square"] for row in stage.output.rows()] == [n * n for n in range(20)]
    assert stage.output.names(".parquet") == numbers.names(".parquet")
    assert (manifest.status, manifest.rows_in, manifest.rows_out, manifest.completion_tokens) == ("done", 20, 20, 20)
    assert manifest.files == {name: stage.output.sha256(name) for name in stage.output.names(".parquet")}


def test_a_failed_row_is_kept_with_its_reason_and_the_others_go_on(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path, is_light=is_light, bad=(4, 7))
    manifest = run_stage(stage, max_failure_rate=0.1)
    assert manifest.failed == {"InputError": 2}
    assert {row["number"] for row in stage.output.rows()} == set(range(20)) - {4, 7}
    failed = stage.output.child("failed")
    lines = [json.loads(line) for name in failed.names() for line in failed.read_bytes(name).splitlines()]
    assert {(line["prompt_id"], line["stage"], line["error"]) for line in lines} == {
        ("p-4", "squares", "InputError"),
        ("p-7", "squares", "InputError"),
    }
    assert "4 cannot be squared here" in lines[0]["message"]


def cubes(tmp_path: Path, is_light: bool) -> Stage:
    """Return a stage that reads `squares`."""
    return dataclasses.replace(
        squares(tmp_path, is_light=is_light),
        name="cubes",
        source=Folder.at(tmp_path / "squares"),
        output=Folder.at(tmp_path / "cubes"),
    )


@pytest.mark.parametrize("is_light", [pytest.param(False, marks=pytest.mark.soak), True], ids=["actors", "driver"])
def test_failed_rows_are_retried_alone_and_go_through_the_later_stages(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    failing = squares(tmp_path, is_light=is_light, bad=(4, 7, 19))
    run_stage(failing, max_failure_rate=0.5)
    later = cubes(tmp_path, is_light)
    assert run_stage(later, max_failure_rate=0).rows_in == 17
    untouched = failing.output.sha256("shard-00000.parquet")

    half_mended = run_stage(squares(tmp_path, is_light=is_light, bad=(7,)), max_failure_rate=0.5, retry_failed=True)
    assert (half_mended.failed, half_mended.rows_out, half_mended.completion_tokens) == ({"InputError": 1}, 19, 19)
    assert failing.output.child("failed").names() == ["shard-00002.jsonl"]
    mended = run_stage(squares(tmp_path, is_light=is_light), max_failure_rate=0, retry_failed=True)
    assert (mended.failed, mended.rows_in, mended.rows_out, mended.completion_tokens) == ({}, 20, 20, 20)
    assert [row["number"] for row in failing.output.rows()] == list(range(20)), "in the source's order"
    assert failing.output.sha256("shard-00000.parquet") == untouched

    completed = run_stage(later, max_failure_rate=0)
    assert (completed.rows_in, completed.rows_out, completed.completion_tokens) == (20, 20, 20)
    assert [row["number"] for row in later.output.rows()] == list(range(20))


@pytest.mark.soak
def test_rows_that_are_tried_again_do_not_count_as_failed_before_they_are_made(
    ray_cluster: None, tmp_path: Path
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    run_stage(squares(tmp_path, bad=tuple(range(20))), max_failure_rate=1)
    mended = run_stage(squares(tmp_path), max_failure_rate=0, retry_failed=True)
    assert (mended.failed, mended.rows_out) == ({}, 20)


def test_without_the_flag_failed_rows_are_left_alone(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    first = run_stage(squares(tmp_path, bad=(4,)), max_failure_rate=0.5)
    assert run_stage(squares(tmp_path), max_failure_rate=0.5) == first


def test_more_failures_than_allowed_stop_the_run_and_keep_what_is_done(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    with pytest.raises(TooManyFailures, match=r"InputError.*max_failure_rate 0\.1"):
        run_stage(squares(tmp_path, is_light=is_light, bad=tuple(range(10))), max_failure_rate=0.1)
    manifest = read_manifest(Folder.at(tmp_path / "squares"))
    assert manifest is not None
    assert manifest.status == "running"


def test_the_driver_hears_of_a_finished_shard_while_the_other_is_still_at_work(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=6)
    never = (tmp_path / "squares", 100)
    stage = squares(tmp_path, is_light=is_light, bad=(3, 4, 5), slow_until=never)
    with pytest.raises(TooManyFailures, match="3 of 3 rows failed"):
        run_stage(stage, max_failure_rate=0.1)
    assert stage.output.names(".parquet") == ["shard-00001.parquet"]


def test_a_broken_worker_stops_the_stage_instead_of_blaming_its_rows(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path, is_light=is_light, broken=True)
    with pytest.raises(EngineError, match="the worker is broken"):
        run_stage(stage, max_failure_rate=1)
    assert stage.output.names(".parquet") == []


def test_the_driver_makes_a_light_stage_itself_while_it_is_small(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    pids = {}
    for rows_in_driver in (19, 20):
        monkeypatch.setattr("aft_ray.stages.ROWS_IN_DRIVER", rows_in_driver)
        stage = squares(tmp_path, is_light=True, pid_file=tmp_path / "pid")
        stage = dataclasses.replace(stage, output=Folder.at(tmp_path / f"squares-{rows_in_driver}"))
        assert run_stage(stage, max_failure_rate=0).num_workers == 1
        pids[rows_in_driver] = int((tmp_path / "pid").read_text())
    assert pids[20] == os.getpid()
    assert pids[19] != os.getpid()


def test_other_settings_are_refused_with_the_difference(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    run_stage(squares(tmp_path, settings={"power": {"of": 2}}), max_failure_rate=0)
    with pytest.raises(ResumeRefused, match=r"power\.of: was 2, is 3"):
        run_stage(squares(tmp_path, settings={"power": {"of": 3}}), max_failure_rate=0)


def test_a_finished_stage_is_not_run_again(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    first = run_stage(squares(tmp_path), max_failure_rate=0)
    again = run_stage(squares(tmp_path, broken=True), max_failure_rate=0)
    assert again == first


def test_rows_that_changed_in_the_source_are_refused_and_new_ones_are_made_alone(
    ray_cluster: None, tmp_path: Path
) -> None:
    numbers = source(Folder.at(tmp_path / "numbers"))
    before = run_stage(squares(tmp_path), max_failure_rate=0)
    last = numbers.names(".parquet")[-1]

    def rewrite(rows: list[dict[str, Any]]) -> None:
        """Write other rows into the last shard, under the same settings, as a stage does that was made again."""
        manifest = read_manifest(numbers)
        assert manifest is not None
        num_rows = manifest.rows_out + len(rows) - numbers.num_rows(last)
        files = {**manifest.files, last: numbers.write_table(last, pa.Table.from_pylist(rows, schema=NUMBERS))}
        write_manifest(numbers, dataclasses.replace(manifest, rows_in=num_rows, rows_out=num_rows, files=files))

    rows = numbers.read_table(last).to_pylist()
    rewrite([*rows, {"prompt_id": "p-new", "number": 100}])
    after = run_stage(squares(tmp_path), max_failure_rate=0)
    assert (before.completion_tokens, after.completion_tokens, after.rows_out) == (20, 21, 21), "one row was made"
    rewrite([{**rows[0], "number": 7}, *rows[1:], {"prompt_id": "p-new", "number": 100}])
    with pytest.raises(
        ResumeRefused, match=rf"squares/{last} was made from rows that .*numbers/{last} .*\(1 of them, such as p-18\)"
    ):
        run_stage(squares(tmp_path), max_failure_rate=0)


def test_a_stage_without_its_source_says_which_one_is_missing(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numbers: this stage is not finished"):
        run_stage(squares(tmp_path), max_failure_rate=0)


@pytest.mark.soak
def test_a_slow_row_delays_its_own_shard_and_no_other(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    stage = squares(tmp_path, slow_until=(tmp_path / "squares", 19))
    manifest = run_stage(stage, max_failure_rate=0)
    assert (manifest.rows_out, manifest.failed) == (60, {}), "row 0 waited for the 19 other shards, and they came"


def test_a_worker_killed_in_mid_stage_is_replaced_and_no_row_is_lost(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=45)
    stage = squares(tmp_path, seconds=0.3, pid_file=tmp_path / "pid")

    killed = []

    def kill() -> None:
        while len(stage.output.names(".parquet")) < 4:
            time.sleep(0.02)
        killed.append((tmp_path / "pid").read_text())
        os.kill(int(killed[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    manifest = run_stage(stage, max_failure_rate=0)
    killer.join()
    assert (tmp_path / "pid").read_text() != killed[0], "another process finished the work"
    assert [row["square"] for row in stage.output.rows()] == [n * n for n in range(45)]
    assert (manifest.status, manifest.completion_tokens, manifest.failed) == ("done", 45, {})


def test_a_wrong_setting_found_by_a_worker_stops_the_stage_at_once(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    with pytest.raises(ConfigError, match="squares: not installed"):
        run_stage(dataclasses.replace(squares(tmp_path), worker=NotInstalled), max_failure_rate=1)


class NotInstalled(RowWorker):
    """A worker that finds at its first row that a package is missing."""

    async def process(self, row: dict[str, Any]) -> Processed:
        raise ConfigError("not installed")


class Unwritable(RowWorker):
    """A worker whose rows no file can hold, and which raises one message that cannot be written either."""

    async def process(self, row: dict[str, Any]) -> Processed:
        if row["number"] == 3:
            return Processed(rows=[{**row, "prompt_id": "half \ud83d", "square": 9}])
        if row["number"] == 4:
            return Processed(rows=[{**row, "square": 2**70}])
        if row["number"] == 5:
            raise ValueError("cannot be shown: \ud83d")
        return Processed(rows=[{**row, "square": row["number"] ** 2}])


def test_a_row_that_no_file_can_hold_fails_alone(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = dataclasses.replace(squares(tmp_path), worker=Unwritable)
    manifest = run_stage(stage, max_failure_rate=0.5)
    assert {row["number"] for row in stage.output.rows()} == set(range(20)) - {3, 4, 5}
    assert sum(manifest.failed.values()) == 3
    lines = [json.loads(line) for line in stage.output.child("failed").read_bytes("shard-00001.jsonl").splitlines()]
    assert [line["prompt_id"] for line in lines] == ["p-3", "p-4", "p-5"]
    assert lines[2]["message"] == "cannot be shown: \ufffd"


class KeepsFull(RowWorker):
    """A worker whose first row of a shard ends only while `IN_FLIGHT` shards are open, or all have started."""

    IN_FLIGHT = 4

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.num_begun = self.num_done = 0

    async def process(self, row: dict[str, Any]) -> Processed:
        if row["number"] % 3 == 0:
            self.num_begun += 1
            async with asyncio.timeout(120):
                while self.num_begun - self.num_done < self.IN_FLIGHT and self.num_begun < self.num_shards:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            self.num_done += 1
        return Processed(rows=[{**row, "square": row["number"] ** 2}])


def test_the_place_of_a_finished_shard_is_taken_while_all_others_are_still_at_work(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    placement = PlacementConfig(num_cpus=1, max_shards_in_flight=KeepsFull.IN_FLIGHT)
    stage = squares(tmp_path, is_light=is_light)
    stage = dataclasses.replace(stage, worker=partial(KeepsFull, 20), placement=placement)
    manifest = run_stage(stage, max_failure_rate=0)
    assert (manifest.rows_out, manifest.failed) == (60, {}), "with a pause between shards the rows would time out"


class WaitsForOthers(RowWorker):
    """A worker that makes no row before `num_workers` processes have a worker."""

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder, self.num_workers = folder, num_workers
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).touch()

    async def process(self, row: dict[str, Any]) -> Processed:
        async with asyncio.timeout(120):
            while len(list(self.folder.iterdir())) < self.num_workers:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return Processed(rows=[{**row, "square": row["number"] ** 2}])


@pytest.mark.parametrize(
    "num_shards, num_workers",
    [
        pytest.param(20, 3, id="work for more than there may be", marks=pytest.mark.soak),
        pytest.param(3, 2, id="work for two"),
    ],
)
def test_between_min_and_max_a_stage_uses_as_many_workers_as_have_work(
    ray_cluster: None, tmp_path: Path, num_shards: int, num_workers: int
) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=3 * num_shards)
    placement = PlacementConfig(num_cpus=1, min_actors=1, max_actors=3, max_shards_in_flight=2)
    worker = partial(WaitsForOthers, tmp_path / "pids", num_workers)
    stage = dataclasses.replace(squares(tmp_path), worker=worker, placement=placement)
    manifest = run_stage(stage, max_failure_rate=0)
    assert (manifest.rows_out, manifest.failed) == (3 * num_shards, {}), "with fewer workers the rows would time out"
    assert len(list((tmp_path / "pids").iterdir())) == num_workers


class OutlivesOthers(WaitsForOthers):
    """Makes row 0 when no other process of the stage is left."""

    async def process(self, row: dict[str, Any]) -> Processed:
        made = await super().process(row)
        async with asyncio.timeout(90 if row["number"] == 0 else None):
            while row["number"] == 0 and any(map(psutil.pid_exists, self.others())):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return made

    def others(self) -> set[int]:
        return {int(file.name) for file in self.folder.iterdir()} - {os.getpid()}


@pytest.mark.soak
def test_workers_that_a_stage_needs_no_longer_are_given_back_before_it_ends(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=30)
    placement = PlacementConfig(num_cpus=1, min_actors=1, max_actors=3, max_shards_in_flight=2)
    worker = partial(OutlivesOthers, tmp_path / "pids", 3)
    manifest = run_stage(dataclasses.replace(squares(tmp_path), worker=worker, placement=placement), max_failure_rate=0)
    assert (manifest.rows_out, manifest.failed) == (30, {}), "with workers that stay the first row would time out"


class TakesLongToLoad(Squarer):
    """A worker that is built in four seconds."""

    def __init__(self) -> None:
        time.sleep(4)
        super().__init__()


@pytest.mark.soak
def test_a_model_that_takes_long_to_load_does_not_end_the_stage(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data ends an execution in which no shard is finished for half an hour; here, for a second."""
    import ray

    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    source(Folder.at(tmp_path / "numbers"), num_rows=6)
    manifest = run_stage(dataclasses.replace(squares(tmp_path), worker=TakesLongToLoad), max_failure_rate=0)
    assert manifest.rows_out == 6


class Mortal(RowWorker):
    """A worker whose engine dies after `num_rows` rows. Every build and every close leaves a file in `folder`."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder, self.num_rows, self.num_asked = folder, num_rows, 0
        self.name = f"{os.getpid()}-{time.monotonic_ns()}"
        (folder / f"{self.name}.built").touch()

    async def process(self, row: dict[str, Any]) -> Processed:
        self.num_asked += 1
        await asyncio.sleep(0.05)
        await self.check()
        return Processed(rows=[{**row, "square": row["number"] ** 2}], completion_tokens=1)

    async def check(self) -> None:
        if self.num_asked > self.num_rows:
            raise EngineDead("its last words")

    async def close(self) -> None:
        (self.folder / f"{self.name}.closed").touch()


def mortal(tmp_path: Path, num_rows: int, is_light: bool) -> Stage:
    (tmp_path / "lives").mkdir()
    source(Folder.at(tmp_path / "numbers"), num_rows=45)
    stage = squares(tmp_path, is_light=is_light)
    return dataclasses.replace(stage, worker=partial(Mortal, tmp_path / "lives", num_rows))


def lives(tmp_path: Path, end: str) -> set[str]:
    return {file.stem for file in (tmp_path / "lives").glob(f"*.{end}")}


def test_an_engine_that_dies_is_built_again_and_costs_only_the_rows_in_flight(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    stage = mortal(tmp_path, num_rows=12, is_light=is_light)
    manifest = run_stage(stage, max_failure_rate=0)
    assert [row["square"] for row in stage.output.rows()] == [n * n for n in range(45)]
    assert (manifest.status, manifest.failed, manifest.completion_tokens) == ("done", {}, 45)
    built = lives(tmp_path, "built")
    assert len(built) >= 4, "a life is at most 12 rows of 45"
    assert len({name.split("-")[0] for name in built}) == manifest.num_workers == 1, "in one process"
    end = time.monotonic() + 30
    while lives(tmp_path, "closed") != built and time.monotonic() < end:
        time.sleep(0.1)
    assert lives(tmp_path, "closed") == built, "each is closed, also the last one when the stage is over"


def test_an_engine_that_dies_again_and_again_stops_the_stage_with_its_last_words(
    ray_cluster: None, tmp_path: Path, is_light: bool
) -> None:
    stage = mortal(tmp_path, num_rows=0, is_light=is_light)
    with pytest.raises(EngineError, match=r"squares: the engine died 3 times .* at last: its last words"):
        run_stage(stage, max_failure_rate=1)
    assert len(lives(tmp_path, "built")) == 3
    assert stage.output.names(".parquet") == [], "no row is blamed"


@pytest.mark.soak
def test_a_resumed_stage_counts_only_its_own_work_in_rates_and_all_rows_at_the_end(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path)
    whole = run_stage(stage, max_failure_rate=0)
    killed = dataclasses.replace(whole, status="running", files={})
    write_manifest(stage.output, killed)
    stage.output.remove("shard-00003.parquet")
    capsys.readouterr()
    resumed = run_stage(stage, max_failure_rate=0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "20/20 rows" in line
    assert "tok/s" not in line, "three tokens in no time give no rate"
    assert (resumed.rows_out, resumed.completion_tokens, resumed.files) == (20, 20, whole.files)
    assert (resumed.num_workers, resumed.num_nodes) == (1, 1)
    assert resumed.worker_seconds >= whole.worker_seconds


DRIVER = """
import sys, logging
from pathlib import Path
import ray
from aft_ray.stages import run_stage
from tests.test_stages import squares
if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    run_stage(squares(Path(sys.argv[1]), seconds=0.2), max_failure_rate=0)
"""


@pytest.mark.soak
def test_killed_at_random_moments_and_run_again_it_holds_every_row_once(tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=45)
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    root = Path(__file__).parent.parent
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    output = Folder.at(tmp_path / "squares")
    draw = random.Random(1)
    for _ in range(3):
        driver = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        before = len(output.names(".parquet"))
        limit = time.monotonic() + 90
        while len(output.names(".parquet")) < before + 2 and driver.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(draw.random() * 0.4)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        numbers = [row["number"] for row in output.rows()]
        assert len(numbers) == len(set(numbers)), "no row twice, and every shard that is there can be read"
    subprocess.run(command, env=environment, check=True, timeout=200, stderr=subprocess.DEVNULL)
    assert [row["square"] for row in output.rows()] == [n * n for n in range(45)]
    manifest = read_manifest(output)
    assert manifest is not None
    assert (manifest.status, manifest.rows_out) == ("done", 45)
