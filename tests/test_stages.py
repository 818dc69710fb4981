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

import pyarrow as pa
import pytest

from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError, EngineError, InputError, ResumeRefused, TooManyFailures
from aft_ray.runs import Manifest, read_manifest, write_manifest
from aft_ray.shards import Processed, RowWorker, Stage, write_first_shards
from aft_ray.stages import run_stage
from aft_ray.storage import Folder

NUMBERS = pa.schema([("prompt_id", pa.string()), ("number", pa.int64())])
SQUARES = NUMBERS.append(pa.field("square", pa.int64()))


class Squarer:
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


def squares(tmp_path: Path, settings: dict[str, Any] | None = None, **knobs: Any) -> Stage:
    return Stage(
        name="squares",
        source=Folder.at(tmp_path / "numbers"),
        output=Folder.at(tmp_path / "squares"),
        schema=SQUARES,
        settings=settings or {},
        worker=Build(**knobs),
        placement=PlacementConfig(num_cpus=1, max_shards_in_flight=2),
    )


def test_every_row_comes_out_exactly_once_and_in_its_own_shard(ray_cluster: None, tmp_path: Path) -> None:
    numbers = source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path)
    manifest = run_stage(stage, max_failure_rate=0)
    assert [row["square"] for row in stage.output.rows()] == [n * n for n in range(20)]
    assert stage.output.names(".parquet") == numbers.names(".parquet")
    assert (manifest.status, manifest.rows_in, manifest.rows_out, manifest.completion_tokens) == ("done", 20, 20, 20)
    assert manifest.files == {name: stage.output.sha256(name) for name in stage.output.names(".parquet")}


def test_a_failed_row_is_kept_with_its_reason_and_the_others_go_on(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path, bad=(4, 7))
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


def cubes(tmp_path: Path) -> Stage:
    """Return a stage that reads `squares`."""
    return dataclasses.replace(
        squares(tmp_path), name="cubes", source=Folder.at(tmp_path / "squares"), output=Folder.at(tmp_path / "cubes")
    )


def test_failed_rows_are_retried_alone_and_go_through_the_later_stages(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    failing = squares(tmp_path, bad=(4, 7, 19))
    run_stage(failing, max_failure_rate=0.5)
    later = cubes(tmp_path)
    assert run_stage(later, max_failure_rate=0).rows_in == 17
    untouched = failing.output.sha256("shard-00000.parquet")

    half_mended = run_stage(squares(tmp_path, bad=(7,)), max_failure_rate=0.5, retry_failed=True)
    assert (half_mended.failed, half_mended.rows_out, half_mended.completion_tokens) == ({"InputError": 1}, 19, 19)
    assert failing.output.child("failed").names() == ["shard-00002.jsonl"]
    mended = run_stage(squares(tmp_path), max_failure_rate=0, retry_failed=True)
    assert (mended.failed, mended.rows_in, mended.rows_out, mended.completion_tokens) == ({}, 20, 20, 20)
    assert [row["number"] for row in failing.output.rows()] == list(range(20)), "in the source's order"
    assert failing.output.sha256("shard-00000.parquet") == untouched

    completed = run_stage(later, max_failure_rate=0)
    assert (completed.rows_in, completed.rows_out, completed.completion_tokens) == (20, 20, 20)
    assert [row["number"] for row in later.output.rows()] == list(range(20))


def test_without_the_flag_failed_rows_are_left_alone(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    first = run_stage(squares(tmp_path, bad=(4,)), max_failure_rate=0.5)
    assert run_stage(squares(tmp_path), max_failure_rate=0.5) == first


def test_more_failures_than_allowed_stop_the_run_and_keep_what_is_done(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    with pytest.raises(TooManyFailures, match=r"InputError.*max_failure_rate 0\.1"):
        run_stage(squares(tmp_path, bad=tuple(range(10))), max_failure_rate=0.1)
    manifest = read_manifest(Folder.at(tmp_path / "squares"))
    assert manifest is not None
    assert manifest.status == "running"


def test_a_broken_worker_stops_the_stage_instead_of_blaming_its_rows(ray_cluster: None, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"))
    stage = squares(tmp_path, broken=True)
    with pytest.raises(EngineError, match="the worker is broken"):
        run_stage(stage, max_failure_rate=1)
    assert stage.output.names(".parquet") == []


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


def test_a_stage_without_its_source_says_which_one_is_missing(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="numbers: this stage is not finished"):
        run_stage(squares(tmp_path), max_failure_rate=0)


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
    ray_cluster: None, tmp_path: Path
) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    placement = PlacementConfig(num_cpus=1, max_shards_in_flight=KeepsFull.IN_FLIGHT)
    stage = dataclasses.replace(squares(tmp_path), worker=partial(KeepsFull, 20), placement=placement)
    manifest = run_stage(stage, max_failure_rate=0)
    assert (manifest.rows_out, manifest.failed) == (60, {}), "with a pause between shards the rows would time out"


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
