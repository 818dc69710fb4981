"""The report of a run: `report.html`, one file that needs nothing else, and the same numbers in `results.json`.

    write_report(data, Folder.at("runs/demo/report"))

`ReportData` holds plain values that the jobs fill; nothing is computed here but wording and charts. The page is
`report.html` beside this file: rendered by jinja2 with autoescaping, since prompts and answers may hold HTML. It loads
nothing from anywhere and runs no script.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.evaluation.charts import Point, interval_chart, line_chart
from aft_ray.evaluation.examples import Example
from aft_ray.evaluation.metrics import Comparison, SystemMetrics
from aft_ray.evaluation.perplexity import ConditionPerplexity
from aft_ray.evaluation.statistics import Estimate
from aft_ray.inference.plan import Plan
from aft_ray.storage import Folder

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name(PAGE)
SMALL_MODEL = 1_000_000_000
"""Parameters below which the paper's gains are out of reach: it measured them on 7B and 8B models."""
SYSTEMS = {
    "base": "the model before training",
    "sft": "fine-tuned to write the target from the prompt alone",
    "aft": "fine-tuned to write the target from the prompt and its drafts",
    "joint": "fine-tuned on the examples of both sft and aft",
    "pseudo": "fine-tuned on targets that were not written from the drafts",
    "no_proposals": "fine-tuned on the aggregator prompt with empty slots instead of drafts",
}
"""The models of a run in words, by the names that a run gives them."""
UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML must not contain."""


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One stage of the pipeline, as its manifest describes it."""

    name: str
    rows_in: int
    rows_out: int
    rows_failed: int
    prompt_tokens: int | None
    """None for a stage that calls no model."""
    completion_tokens: int | None
    seconds: float
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that a stage left out on purpose, counted by reason."""


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The training of one adapter or model."""

    variant: str
    num_examples: int
    num_steps: int
    num_workers: int
    startup_seconds: float
    """Seconds until the first step, counted from the end of the variant trained before in the same workers, if any."""
    seconds: float
    """Duration of the steps."""
    num_tokens: int
    """Tokens of all steps, without padding."""
    num_trained_tokens: int
    """Number of those tokens that are in the loss."""
    curve: tuple[tuple[float, float], ...]
    """(step, training loss)"""
    held_out: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """(step, perplexity) by variant of the held-out examples; empty without `training.eval_steps`."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(self.seconds, 1e-9)

    @property
    def trained_tokens_per_second(self) -> float:
        return self.num_trained_tokens / max(self.seconds, 1e-9)

    @property
    def first_loss(self) -> float | None:
        """The mean over the first tenth of the curve."""
        return _mean_loss(self.curve[: self._tenth])

    @property
    def last_loss(self) -> float | None:
        return _mean_loss(self.curve[-self._tenth :])

    @property
    def _tenth(self) -> int:
        return max(1, len(self.curve) // 10)


@dataclass(frozen=True, kw_only=True)
class MethodAnswer:
    """A study's answer to whether training to aggregate works, measured on a model small enough to train here."""

    sentences: tuple[str, ...]
    """The answer in words; a word such as "more" is there only where the interval supports it."""
    points: tuple[Point, ...]
    """Share of right answers by model (row) and way of answering (series)."""
    num_questions: int
    num_proposals: int
    page: str
    """The study's own page, relative to the report."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All values that the report shows."""

    title: str
    date: str
    """When the run was evaluated, with its time zone."""
    command: str
    """The command that makes this run again."""
    commit: str | None
    model: str
    num_parameters: int | None
    task: str
    num_train_prompts: int
    num_held_out_prompts: int
    reward: str
    """The meaning of a score, such as `share of the prompt's constraints that the answer meets`."""
    plan: Plan
    """The evaluation's plan, which all systems have but those of `plans`."""
    seed: int
    hardware: str
    versions: Mapping[str, str]
    stages: tuple[StageSummary, ...]
    training: tuple[TrainingSummary, ...]
    perplexities: tuple[ConditionPerplexity, ...]
    """In the order of the paper's Figure 6; the first one is what the others are compared with."""
    perplexity_targets: str = "held-out prompts"
    """The prompts whose targets were scored."""
    systems: tuple[SystemMetrics, ...]
    plans: Mapping[str, Plan] = field(default_factory=dict)
    """Plans of systems that have one of their own, by system."""
    base_system: str | None
    """Which of `systems` is the untrained model."""
    comparisons: tuple[Comparison, ...] = ()
    examples: tuple[Example, ...] = ()
    method: MethodAnswer | None = None
    """None when the run has no finished study."""
    notes: tuple[str, ...] = field(default=())
    """Anything a reader must know, such as prompts that failed."""


def write_report(data: ReportData, folder: Folder) -> None:
    """Write `report.html` and `results.json` into the folder."""
    numbers = json.dumps(results(data), indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    folder.write_bytes("results.json", numbers.encode())
    folder.write_bytes(PAGE, render(data).encode())


def results(data: ReportData) -> dict[str, Any]:
    """Return the report's numbers as JSON values. A number that is not finite becomes null."""
    return {"what_this_does_not_show": limits(data), **_finite(dataclasses.asdict(data))}


def render(data: ReportData) -> str:
    """Return the page as HTML."""
    template = environment().get_template(TEMPLATE.name)
    charts = {
        "method": _method_chart(data),
        "rewards": _rewards_chart(data),
        "perplexity": _perplexity_chart(data),
        "loss": _loss_chart(data),
        "held_out": _held_out_charts(data),
    }
    html = template.render(data=data, limits=limits(data), words=SYSTEMS, charts=charts, max_seconds=_max_seconds(data))
    return UNSHOWABLE.sub("\ufffd", html)


def curve_of(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[float, float], ...]:
    """Return (step, loss) from the rows of a training's metrics.jsonl, without the rows that hold no loss."""
    return tuple((float(row["step"]), float(row["loss"])) for row in rows if row.get("loss") is not None)


def held_out_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[float, float], ...]]:
    """Return (step, perplexity) by variant of the held-out examples, from the rows of a training's held_out.jsonl."""
    variants = rows[0]["perplexity"] if rows else ()
    return {variant: tuple((float(row["step"]), row["perplexity"][variant]) for row in rows) for variant in variants}


def limits(data: ReportData) -> str:
    """Return a sentence on what the run does not show, with the run's own numbers."""
    small = data.num_parameters is not None and data.num_parameters < SMALL_MODEL
    paper = (
        f"the paper's quality gains: a model of {short_count(data.num_parameters or 0)} parameters cannot show them "
        "(they were measured on 7B and 8B models)"
        if small
        else "how the method does on other tasks, models or seeds"
    )
    return f"{paper}. {_level(data)}One training run with one seed: the intervals cover the choice of prompts only."


def _level(data: ReportData) -> str:
    for system in data.systems:
        share = system.single_pass
        if system.system == data.base_system and share.mean is not None:
            return (
                f"For scale: {data.model}, untrained and asked once, does everything that was asked in "
                f"{percent(share.mean)} of its answers ({share.num} prompts). "
            )
    return ""


def verdict(difference: Estimate) -> str:
    """Return a difference in words. It is called higher or lower only when the whole interval is."""
    if difference.mean is None or difference.low is None:
        return "cannot tell"
    if not difference.excludes_zero:
        return "no difference shown"
    return "higher" if difference.mean > 0 else "lower"


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """Return `0.47` or `+0.05`, or a dash for a missing value."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """Return `0.25` as `25 %`, or a dash for a missing value."""
    return "–" if value is None else f"{100 * value:.0f} %"


def short_count(value: float) -> str:
    """Return 135000000 as `135M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    """Return seconds as `0.4 s`, `75 s` or `12 min 30 s`."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60:,} min {int(seconds) % 60} s"


def _method_chart(data: ReportData) -> str | None:
    if data.method is None:
        return None
    label = "Share of right answers by model and way of answering, with 95 % intervals; the sentences beside it say it"
    return interval_chart("method", label, data.method.points, "share of right answers")


def _rewards_chart(data: ReportData) -> str | None:
    kinds = (("single answer", "single"), ("aggregated", "final"), ("best draft (oracle)", "best_draft"))
    points = [
        _point(system.system, kind, getattr(system, name))
        for system in data.systems
        for kind, name in kinds
        if getattr(system, name).mean is not None and (name != "final" or system.num_layers)
    ]
    label = "Mean reward by system with 95 % intervals; the numbers are in the table beside it"
    return interval_chart("rewards", label, points, "mean reward") if points else None


def _perplexity_chart(data: ReportData) -> str | None:
    points = [
        Point(row=one.name, series="perplexity", mean=one.perplexity, low=one.low, high=one.high)
        for one in data.perplexities
        if one.perplexity is not None
    ]
    label = "Target perplexity by condition with 95 % intervals; the numbers are in the table beside it"
    x_label = "perplexity of the target (log scale)"
    return interval_chart("perplexity", label, points, x_label, log=True) if points else None


def _loss_chart(data: ReportData) -> str | None:
    curves = {run.variant: run.curve for run in data.training if run.curve}
    label = "Training loss by step, one line per adapter; first and last values are in the table beside it"
    return line_chart("loss", label, curves, "step", "training loss") if curves else None


def _held_out_charts(data: ReportData) -> list[str]:
    """Draw one chart per adapter."""
    return [
        line_chart(
            f"held-out-{run.variant}",
            f"Perplexity of the held-out targets while {run.variant} is trained, one line per kind of prompt",
            run.held_out,
            "step",
            f"held-out perplexity, {run.variant} in training",
        )
        for run in data.training
        if run.held_out
    ]


def _point(row: str, series: str, value: Estimate) -> Point:
    assert value.mean is not None
    return Point(row=row, series=series, mean=value.mean, low=value.low, high=value.high)


def environment(*folders: Path) -> Environment:
    """Return the pages' jinja2 environment: autoescaping, our filters, the templates of this folder and `folders`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATE.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "drawing": Markup}
    environment.globals |= {"verdict": verdict}
    return environment


def _max_seconds(data: ReportData) -> float:
    return max((stage.seconds for stage in data.stages), default=0) or 1


def _mean_loss(curve: Sequence[tuple[float, float]]) -> float | None:
    return sum(loss for _, loss in curve) / len(curve) if curve else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
