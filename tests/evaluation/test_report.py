"""The page and the numbers of a small run, read back."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aft_ray.evaluation.charts import Point
from aft_ray.evaluation.examples import Check, choose_examples
from aft_ray.evaluation.metrics import compare, score_answers, system_metrics
from aft_ray.evaluation.perplexity import TargetScore, summarise
from aft_ray.evaluation.report import (
    MethodAnswer,
    ReportData,
    StageSummary,
    TrainingSummary,
    curve_of,
    duration,
    held_out_curves,
    limits,
    number,
    render,
    results,
    short_count,
    verdict,
    write_report,
)
from aft_ray.evaluation.statistics import Estimate
from aft_ray.inference.plan import Plan
from aft_ray.storage import Folder

from .rows import answered

HOSTILE = (
    "right </div></article><script>alert(1)</script><img src=http://example.org/x onerror='alert(2)'> {{ 7*7 }} \x00"
)
VOID = {"meta", "link", "br", "hr", "img", "input", "col", "base"}


class Page(HTMLParser):
    """Reads a page, and refuses elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


def report_data(**changes: Any) -> ReportData:
    """Three prompts, two systems, two conditions: every number can be worked out by hand."""
    base_rows = [answered("p-1", [], "wrong"), answered("p-2", [], "half"), answered("p-3", [], "right")]
    aft_rows = [
        answered("p-1", ["right", "wrong"], "right"),
        answered("p-2", ["wrong", "wrong"], "right"),
        answered("p-3", [HOSTILE, "half"], HOSTILE),
    ]
    base, aft = score_answers(base_rows), score_answers(aft_rows)
    nats = {"base, prompt only": [4.0, 12.0], "AFT, prompt + proposals": [2.0, 4.0]}
    data = ReportData(
        title="A small run",
        date="2026-11-14 10:32 UTC",
        command="aft-ray run --config configs/small.yaml",
        commit="0a1b2c3",
        model="smollm2-135m-instruct",
        num_parameters=134_515_008,
        task="letters",
        num_train_prompts=9,
        num_held_out_prompts=3,
        reward="1 for right, a half for half",
        plan=Plan(num_proposals=2, num_layers=1),
        seed=11,
        hardware="2 CPU cores",
        versions={"ray": "2.60.0"},
        stages=(
            StageSummary(
                name="proposals",
                rows_in=9,
                rows_out=8,
                rows_failed=1,
                prompt_tokens=12345,
                completion_tokens=678,
                seconds=75.0,
            ),
            StageSummary(
                name="training_set",
                rows_in=8,
                rows_out=6,
                rows_failed=0,
                prompt_tokens=None,
                completion_tokens=None,
                seconds=2.0,
                left_out={"target rejected": 2},
            ),
        ),
        training=(
            TrainingSummary(
                variant="aft",
                num_examples=9,
                num_steps=20,
                num_workers=2,
                startup_seconds=9.0,
                seconds=61.0,
                num_tokens=6100,
                num_trained_tokens=1220,
                curve=tuple((step, 3.0 - step / 10) for step in range(1, 21)),
                held_out={"sft": ((10, 6.5), (20, 6.0)), "aft": ((10, 3.5), (20, 2.5))},
            ),
        ),
        perplexities=tuple(
            summarise(
                [
                    TargetScore(condition=name, prompt_id=f"p-{row}", nats=value, num_tokens=4)
                    for name, values in nats.items()
                    for row, value in enumerate(values)
                ]
            )
        ),
        systems=(system_metrics("base", base), system_metrics("aft", aft, num_failed=1)),
        base_system="base",
        comparisons=(compare(("aft", aft), ("base", base)),),
        examples=tuple(
            choose_examples("aft", aft_rows, lambda row, text: [Check(name="<b>kind</b>", met=text[0] == "r")])
        ),
    )
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report_data()))


def test_the_page_is_well_formed_and_its_ids_are_unique(page: Page) -> None:
    assert page.tags[0][0] == "html" and page.tags[0][1] == {"lang": "en"}
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert len(page.ids()) == len(set(page.ids())) > 10


def test_the_headline_table_comes_first_and_holds_the_rewards(page: Page) -> None:
    before_limits = page.words[: page.words.index("What this does not show")]
    drafts_and_finals = "0.42 0.00 to 0.75 1.00 no interval +0.58"  # drafts .5, 0, .75; finals all 1
    assert f"aft n = 3, K = 2, L = 1 {drafts_and_finals}" in before_limits
    assert "base n = 3 0.50" in before_limits


def test_perplexities_and_their_difference_are_shown(page: Page) -> None:
    assert "base, prompt only 7.39 2.72 to 20.09" in page.words  # exp(16/8), exp(4/4), exp(12/4)
    assert "AFT, prompt + proposals 2.12" in page.words  # exp(6/8)
    assert "−1.25" in page.words


def test_stages_training_and_run_are_shown(page: Page) -> None:
    assert "proposals 9 8 1 0 12,345 678 75 s" in page.words
    assert "training_set 8 6 0 2 2 target rejected – – 2.0 s" in page.words
    assert "aft 9 20 2 2.850 1.050 9.0 s 61 s 100.0 20.0" in page.words  # losses: means of steps 1-2 and 19-20
    for words in ("aft-ray run --config configs/small.yaml", "0a1b2c3", "2 CPU cores", "ray 2.60.0", "K = 2, L = 1"):
        assert words in page.words


def test_the_answer_of_a_study_comes_first_with_its_chart_and_limits() -> None:
    points = tuple(
        Point(row=row, series=series, mean=0.5, low=0.4, high=0.6)
        for row in ("base model", "after AFT")
        for series in ("a single answer", "aggregated")
    )
    method = MethodAnswer(
        sentences=("Training to aggregate works <here>.",),
        points=points,
        num_questions=600,
        num_proposals=5,
        page="../miniature/report/miniature.html",
    )
    page = Page(render(report_data(method=method)))
    assert page.words.index("Does training to aggregate work?") < page.words.index("The same steps with smollm2")
    assert "Training to aggregate works <here>." in page.words
    assert "Share of 600 held-out questions" in page.words and "K = 5 drafts" in page.words
    assert "What it does not show: anything about open questions" in page.words
    assert ("a", {"href": "../miniature/report/miniature.html"}) in page.tags
    assert results(report_data(method=method))["method"]["points"][0]["mean"] == 0.5


def test_every_system_is_explained_in_words(page: Page) -> None:
    assert "base : the model before training." in page.words
    assert "aft : fine-tuned to write the target from the prompt and its drafts." in page.words


def test_the_limits_state_the_models_own_level(page: Page) -> None:
    text = limits(report_data())
    assert text in page.words
    assert "a model of 135M parameters cannot show them" in text
    assert "33 % of its answers (3 prompts)" in text


def test_a_large_model_is_not_called_too_small() -> None:
    assert "cannot show" not in limits(report_data(num_parameters=8_030_261_248))


def test_what_a_model_wrote_stays_text(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "img" not in tags
    assert (
        "</div></article><script>alert(1)</script><img src=http://example.org/x onerror='alert(2)'> {{ 7*7 }} \ufffd"
        in (page.words)
    )
    assert "<b>kind</b>" in page.words
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


@pytest.mark.parametrize("field", ["title", "model", "command", "reward", "task", "hardware", "commit", "date"])
def test_every_text_of_the_run_is_escaped(field: str) -> None:
    page = Page(render(report_data(**{field: HOSTILE})))
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script>alert(1)</script>" in page.words


def test_hostile_names_in_charts_are_escaped_too() -> None:
    data = report_data()
    systems = (dataclasses.replace(data.systems[1], system="<script>x</script> $a_b$"),)
    page = Page(render(dataclasses.replace(data, systems=systems)))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.words.count("<script>x</script> $a_b$") >= 4, "three tables and a chart name the system"


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    loading = [attrs[name] or "" for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert loading and all(target.startswith("#") for target in loading)
    styles = re.findall(r"url\((?!#)[^)]*\)|@import", render(report_data()))
    assert styles == []
    assert not {"script", "link", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.tags}


def test_checks_are_marked_in_words_and_not_by_colour_alone(page: Page) -> None:
    assert "✓ met: <b>kind</b>" in page.words
    assert "✗ missed: <b>kind</b>" in page.words


def test_tables_have_headings_with_scope_and_charts_have_words(page: Page) -> None:
    assert all(attrs.get("scope") in {"row", "col"} for tag, attrs in page.tags if tag == "th")
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) == 4
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)


def test_charts_take_their_colours_from_the_page() -> None:
    charts = re.findall(r"<svg.*?</svg>", render(report_data()), flags=re.DOTALL)
    assert all("var(--ink)" in chart and not re.search(r"#0[0a0-9]{5}\b", chart) for chart in charts)


def test_the_same_data_gives_the_same_page() -> None:
    assert render(report_data()) == render(report_data())


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    data = report_data()
    write_report(data, Folder.at(tmp_path / "report"))
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["report.html", "results.json"]
    assert (tmp_path / "report" / "report.html").read_text(encoding="utf-8") == render(data)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["systems"][1]["final"] == {"mean": 1.0, "low": None, "high": None, "num": 3, "num_missing": 0}
    assert results["perplexities"][0]["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert results["plan"]["num_proposals"] == 2
    assert results["what_this_does_not_show"] == limits(data)
    assert results["examples"][0]["system"] == "aft"


def test_numbers_that_are_not_finite_become_null_and_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    run = dataclasses.replace(report_data().training[0], curve=((1, float("nan")), (2, 1.0)))
    write_report(report_data(training=(run,), title="half a pair \ud83d"), Folder.at(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["training"][0]["curve"] == [[1, None], [2, 1.0]]
    assert "half a pair \ufffd" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_measured_nothing_still_has_a_page() -> None:
    empty = report_data(
        stages=(), training=(), perplexities=(), systems=(), comparisons=(), examples=(), num_parameters=None
    )
    page = Page(render(empty))
    assert "not measured in this run" in page.words
    assert "nothing was trained in this run" in page.words
    assert "svg" not in [tag for tag, _ in page.tags]


def test_systems_without_any_score_have_dashes() -> None:
    nothing = system_metrics("mute", score_answers([answered("p-1", ["?", "?"], "?")]))
    page = Page(render(report_data(systems=(nothing,), base_system="mute", comparisons=())))
    assert "mute n = 0, K = 2, L = 1 – – – cannot tell" in page.words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 0.3, "higher"), (-0.3, -0.1, "lower"), (-0.1, 0.3, "no difference shown"), (None, None, "cannot tell")],
)
def test_a_difference_is_named_only_when_its_whole_interval_agrees(
    low: float | None, high: float | None, words: str
) -> None:
    mean = 0.1 if low is None or high is None else (low + high) / 2
    assert verdict(Estimate(mean=mean, low=low, high=high, num=9)) == words


def test_numbers_are_written_for_people() -> None:
    assert [number(0.475), number(-0.5, 1), number(0.051, sign=True), number(None), number(float("inf"))] == [
        "0.47",
        "−0.5",
        "+0.05",
        "–",
        "–",
    ]
    assert [short_count(134_515_008), short_count(8e9), short_count(12)] == ["135M", "8B", "12"]
    assert [duration(0.44), duration(75), duration(754), duration(None)] == ["0.4 s", "75 s", "12 min 34 s", "–"]


def test_curves_are_read_from_what_training_wrote() -> None:
    """Rows without a loss are left out."""
    rows = [{"step": step, "perplexity": {"sft": 9.0 - step, "aft": 4.0}, "loss": {}} for step in (1, 2)]
    assert held_out_curves(rows) == {"sft": ((1.0, 8.0), (2.0, 7.0)), "aft": ((1.0, 4.0), (2.0, 4.0))}
    assert held_out_curves([]) == {}
    assert curve_of([{"step": 1, "loss": 2}, {"step": 2, "eval": 3}, {"step": 3, "loss": None}]) == ((1.0, 2.0),)
