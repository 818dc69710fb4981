"""The progress line: what counts in its rates, and what it says of the workers."""

from __future__ import annotations

import pytest

from aft_ray.progress import Progress
from aft_ray.shards import Tally
from aft_ray.stage_attempt import workers_in_words
from aft_ray.stage_workers import Report, Roster, Workforce


def test_rates_and_the_time_left_count_only_what_this_attempt_did() -> None:
    progress = Progress("scores", total=100)
    progress.update(done=60, already=50, tokens=400, working_s=20)
    assert progress.line().split("  ")[-1] == "60/100 rows, 20 tok/s, 80 s left"


def test_what_was_there_before_gives_no_rate() -> None:
    progress = Progress("scores", total=100)
    progress.update(done=50, already=50, working_s=20)
    assert progress.line().split("  ")[-1] == "50/100 rows"


def test_work_of_less_than_a_second_gives_no_rate() -> None:
    progress = Progress("scores", total=100)
    progress.update(done=60, tokens=400, working_s=0.01)
    assert progress.line().split("  ")[-1] == "60/100 rows"


def workforce(
    num_ready: int = 0, num_starting: int = 0, num_nodes: int = 0, silent_s: float | None = 0, fetched: int = 0
) -> Workforce:
    return Workforce(
        num_ready=num_ready,
        num_starting=num_starting,
        num_nodes=num_nodes,
        silent_s=silent_s,
        ready_s=0,
        fetched=fetched,
        open=Tally(),
    )


@pytest.mark.parametrize(
    "workers, words",
    [
        (workforce(silent_s=None), "starting workers"),
        (workforce(num_starting=2), "starting 2 workers"),
        (workforce(num_ready=1, num_nodes=1), "1 worker on 1 node"),
        (workforce(num_ready=3, num_nodes=2, num_starting=1), "3 workers on 2 nodes, 1 starting"),
        (workforce(num_starting=2, fetched=3_210_000_000), "starting 2 workers, 3.2 GB of models fetched"),
        (workforce(silent_s=45.2), "no worker for 45 s"),
    ],
)
def test_the_line_names_the_workers(workers: Workforce, words: str) -> None:
    assert workers_in_words(workers) == words


def report(
    worker: str, node: str, ready_s: float | None, rows: int = 0, fetched: int = 0, is_last: bool = False
) -> Report:
    tally = Tally(rows=rows, tokens=10 * rows)
    return Report(worker=worker, node=node, ready_s=ready_s, open=tally, fetched=fetched, is_last=is_last)


def test_the_roster_keeps_the_last_report_of_each_worker() -> None:
    roster = Roster()
    assert roster.read().silent_s is None
    roster.report(report("a", "node 1", None))
    roster.report(report("b", "node 1", 5.0, rows=2))
    roster.report(report("b", "node 1", 6.0, rows=3))
    roster.report(report("c", "node 2", 1.0, rows=4))
    found = roster.read()
    assert (found.num_ready, found.num_starting, found.num_nodes) == (2, 1, 2)
    assert (found.open.rows, found.open.tokens) == (7, 70)
    assert 5.9 < found.ready_s < 60
    roster.report(report("c", "node 2", 1.0, rows=4, is_last=True))
    assert (roster.read().num_ready, roster.read().open.rows) == (1, 3)


def test_what_two_workers_of_a_node_wait_for_is_fetched_once() -> None:
    roster = Roster()
    roster.report(report("a", "node 1", None, fetched=10))
    roster.report(report("b", "node 1", None, fetched=12))
    roster.report(report("c", "node 2", None, fetched=5))
    assert roster.read().fetched == 17


def test_a_worker_that_is_silent_is_no_worker() -> None:
    roster = Roster()
    roster.report(report("a", "node 1", 5.0, rows=2))
    heard, last = roster.reports["a"]
    roster.reports["a"], roster.last_report = (heard - 45, last), heard - 45
    assert workers_in_words(roster.read()) == "no worker for 45 s"
    assert roster.read().open.rows == 0, "its rows are made again"
