"""The study's page: one file that needs nothing else, in the report's look, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from aft_ray.config import Config
from aft_ray.evaluation.charts import Point, interval_chart
from aft_ray.evaluation.report import environment
from aft_ray.evaluation.statistics import Estimate
from aft_ray.miniature.answers import Study, Way
from aft_ray.miniature.headline import headline, headline_chart
from aft_ray.storage import Folder

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "miniature.html"
NAMES: dict[Way, str] = {
    "draft": "one draft",
    "single": "single answer",
    "vote": "vote over K drafts",
    "L=1": "aggregated, L=1",
    "vote L=1": "vote over K aggregations",
    "L=2": "aggregated, L=2",
    "best": "any of K right (oracle)",
}


def write_page(study: Study, folder: Folder, config: Config, commit: str | None, minutes: float) -> None:
    """Write `miniature.html` and `results.json`."""
    numbers = json.dumps(results(study, commit, minutes), indent=1) + "\n"
    folder.write_bytes("results.json", numbers.encode())
    html = (
        environment(TEMPLATE.parent)
        .get_template(TEMPLATE.name)
        .render(
            study=study,
            names=NAMES,
            plan=config.evaluation.plan,
            source=config.prompts.source,
            num_train=(config.prompts.limit or 0) - config.prompts.held_out,
            commit=commit,
            minutes=minutes,
            headline=headline(study),
            charts={
                "headline": headline_chart(study),
                "rates": _rates_chart(study),
                "differences": _differences_chart(study),
            },
        )
    )
    folder.write_bytes(PAGE, html.encode())


def results(study: Study, commit: str | None, minutes: float) -> dict[str, Any]:
    """The page's numbers as JSON values."""
    verdicts = [{**dataclasses.asdict(difference), "verdict": difference.verdict} for difference in study.differences]
    return {"commit": commit, "minutes": minutes, **dataclasses.asdict(study), "differences": verdicts}


def print_study(study: Study) -> None:
    """Print the headline, then rates and differences as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rates = Table(title=f"right answers [95 % interval], {study.num_questions} questions x {len(study.seeds)} seeds")
    for heading in ("model", *NAMES.values()):
        rates.add_column(heading)
    for system in dict.fromkeys(rate.system for rate in study.rates):
        rates.add_row(system, *(_interval(study.rate(system, way).pooled) for way in NAMES))
    console.print(rates)
    answers = Table(title="questions: first - second, paired by question")
    for heading in ("question", "difference [95 % interval]", "by seed", "reading"):
        answers.add_column(heading)
    for one in study.differences:
        by_seed = " ".join(f"{value:+.2f}" for value in one.by_seed.values())
        answers.add_row(one.question.text, _interval(one.pooled, "+.3f"), by_seed, one.verdict)
    console.print(answers)
    targets = Table(title="perplexity of the held-out targets")
    for heading in ("condition", "perplexity", "nats per token, minus the first [95 % interval]"):
        targets.add_column(heading)
    for surprise in study.surprises:
        difference = _interval(surprise.difference, "+.3f")
        targets.add_row(surprise.condition, f"{surprise.perplexity or float('nan'):.3f}", difference)
    console.print(targets)
    console.print(*headline(study), sep="\n")


def _interval(value: Estimate, form: str = ".3f") -> str:
    if value.mean is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _rates_chart(study: Study) -> str:
    shown: tuple[Way, ...] = ("single", "vote", "L=1", "L=2")  # four series can be told apart
    points = [
        _point(rate.system, NAMES[rate.way], rate.pooled)
        for way in shown
        for rate in study.rates
        if rate.way == way and rate.pooled.mean is not None
    ]
    label = "Share of right answers by model and way of answering, with 95 % intervals; the numbers are in the table"
    return interval_chart("rates", label, points, "share of right answers")


def _differences_chart(study: Study) -> str:
    points = [_point(one.question.text, "difference", one.pooled) for one in study.differences if one.pooled.num]
    label = "Differences that answer the questions, with 95 % intervals; the numbers are in the table"
    return interval_chart("differences", label, points, "first - second, share of right answers")


def _point(row: str, series: str, value: Estimate) -> Point:
    assert value.mean is not None
    return Point(row=row, series=series, mean=value.mean, low=value.low, high=value.high)
