"""The results in a run's folders, as a report and as tables in the terminal at the end of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from aft_ray.config import Config
from aft_ray.data.constraints import parse_all
from aft_ray.data.proposals import data_stages
from aft_ray.data.scorers import answer_scorer_config
from aft_ray.errors import ConfigError, InputError, ResumeRefused
from aft_ray.evaluation.examples import Check, Example, choose_examples
from aft_ray.evaluation.held_out import NOT_HELD_OUT
from aft_ray.evaluation.metrics import Comparison, ScoredAnswer, compare, score_answers, system_metrics
from aft_ray.evaluation.perplexity import ConditionPerplexity, summarise
from aft_ray.evaluation.perplexity_stage import read_scores
from aft_ray.evaluation.report import (
    PAGE,
    MethodAnswer,
    ReportData,
    StageSummary,
    TrainingSummary,
    curve_of,
    held_out_curves,
    write_report,
)
from aft_ray.pipeline.evaluate import adapters_of, models_of, scored_models, serving_of, systems_of
from aft_ray.records import HELD_OUT, TRAIN, metadata_of
from aft_ray.run_lock import owner_of
from aft_ray.runs import RESOLVED, Manifest, Run, commit, versions
from aft_ray.storage import Folder, check_writable

REPORT = "report"
"""Folder of the report in a run's folder."""
NO_STUDY = "the study of the method is not finished; `aft-ray run` with this run's config finishes it"
REWARDS = {
    "constraints": "share of the prompt's one or two checkable constraints that the answer meets",
    "numeric": "1 when the answer states the reference's number, else 0",
    "math": "1 when math-verify finds answer and reference equal, else 0",
    "choice": "1 when the answer chooses the reference's option, else 0",
    "exact": "1 when the answer is the reference, up to letter case, articles and punctuation, else 0",
    "reasoning_gym": "the task's own verifier, 0 to 1",
    "ifeval": "share of the prompt's IFEval instructions that the answer follows (strict)",
    "ifbench": "share of the prompt's IFBench instructions that the answer follows (strict)",
}


def report(run: Run) -> None:
    """Write the report and each system's metrics.json, and then raise InputError if results are missing."""
    _write(run)
    _refuse_missing(run, run.folder.child(REPORT))


def _write(run: Run) -> None:
    data = report_data(run)
    write_report(data, run.folder.child(REPORT))
    for system in data.systems:
        content = json.dumps(dataclasses.asdict(system), indent=1)
        run.folder.child("evaluation").child(system.system).write_bytes("metrics.json", content.encode())


def settings_of(location: str) -> str:
    """Return the file with the settings of the run in a folder. Raises ConfigError where there is no run."""
    if not Folder.at(location).exists(RESOLVED):
        raise ConfigError(f"{location} holds no run: there is no {RESOLVED}")
    return f"{location.rstrip('/')}/{RESOLVED}"


def report_under_way(config: Config) -> bool:
    """Write the report of a run that another command is working on, and say what it lacks. False without one."""
    run = Run(config, Folder.at(config.run.dir))
    owner = owner_of(run.folder)
    if owner is None:
        return False
    _write(run)
    missing = missing_results(run)
    print(
        f"the run is under way (pid {owner.pid} on {owner.host}); its report so far: "
        f"{run.folder.child(REPORT).location}/{PAGE}" + (f", without: {'; '.join(missing)}" if missing else "")
    )
    return True


def write_report_to(config: Config, output: Path) -> tuple[Run, Folder]:
    """Write the report of a run to another folder, and nothing to the run's own, which may be read-only.

    Raises ResumeRefused if there is no run, and InputError as `report` does.
    """
    run, folder = Run(config, Folder.at(config.run.dir)), Folder.at(output)
    if not run.folder.exists(RESOLVED):
        raise ResumeRefused(f"{run.folder.location} holds no run. Check run.dir")
    write_report(report_data(run), folder)
    _refuse_missing(run, folder)
    return run, folder


def finished_report(config: Config) -> Run | None:
    """Return the run if it has a report and its folder cannot be written to."""
    run = Run(config, Folder.at(config.run.dir))
    if not run.folder.child(REPORT).exists("results.json"):
        return None
    try:
        check_writable(config.run.dir)
    except ConfigError:
        return run
    return None


def _refuse_missing(run: Run, folder: Folder) -> None:
    if missing := missing_results(run):
        raise InputError(
            f"the report {folder.location}/{PAGE} is written, without: {'; '.join(missing)}. "
            f"To make what is missing: aft-ray run --config {_shown(run.folder)}/{RESOLVED}"
        )


def missing_results(run: Run) -> list[str]:
    """Return what the report has to show and the run's folder does not hold yet."""
    evaluation = run.config.evaluation
    trained = {**adapters_of(run), **models_of(run)}
    by_default = evaluation.systems is None and run.config.serving.adapters is None
    untrained = [name for name in run.config.training_set.variants if name not in trained] if by_default else []
    stages = [f"evaluation/{system.name}/scores" for system in systems_of(run)]
    stages += [f"evaluation/perplexity/{model}" for model in scored_models(run)]
    manifests = {stage: run.manifest(stage) for stage in stages}
    unfinished = [stage for stage, manifest in manifests.items() if manifest is None or manifest.status != "done"]
    return [f"model/{name}" for name in untrained] + unfinished


def report_data(run: Run) -> ReportData:
    """Read everything the report shows from the run's folders."""
    config = run.config
    systems = systems_of(run)
    rows = {system.name: _scored_answers(run, system.name) for system in systems}
    answers = {name: score_answers(of_system) for name, of_system in rows.items()}
    resampling = {"num_resamples": config.evaluation.num_bootstrap, "seed": config.run.seed}
    num_prompts, tasks = _prompts(run.folder.child("prompts"))
    num_asked = num_prompts[HELD_OUT]
    if config.evaluation.prompts is not None:
        asked, tasks = _prompts(run.folder.child("evaluation/prompts"))
        num_asked = asked.total()
    method = _method(run)
    notes = (NO_STUDY,) if config.miniature is not None and method is None else ()
    return ReportData(
        title=run.folder.name,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=f"aft-ray run --config {_shown(run.folder)}/{RESOLVED}",
        commit=commit(),
        model=str(getattr(config.engine, "model", config.engine.type)),
        num_parameters=_num_parameters(run),
        task=", ".join(tasks),
        num_train_prompts=num_prompts[TRAIN],
        num_held_out_prompts=num_asked,
        reward="; ".join(_reward(config, tasks)),
        plan=config.evaluation.plan,
        plans={system.name: system.plan for system in systems if system.plan not in (None, config.evaluation.plan)},
        seed=config.run.seed,
        hardware=_hardware(),
        versions=versions(),
        stages=_stages(run),
        training=_training(run),
        perplexities=tuple(_perplexities(run, resampling)),
        systems=tuple(
            system_metrics(name, of_system, num_failed=_num_failed(run, name), **resampling)
            for name, of_system in answers.items()
        ),
        base_system=serving_of(run).base_name,
        comparisons=_comparisons(answers, resampling),
        examples=tuple(_examples(run, rows)),
        method=method,
        notes=(*notes, *(f"not in this report, since it is not finished: {name}" for name in missing_results(run))),
    )


def _prompts(folder: Folder) -> tuple[Counter[str], list[str]]:
    """Return the number of prompts by split, and their tasks, from two columns of one shard at a time."""
    num_prompts: Counter[str] = Counter()
    tasks: set[str] = set()
    for name in folder.names(".parquet"):
        columns = folder.read_table(name, ["split", "task"]).to_pydict()
        num_prompts.update(columns["split"])
        tasks.update(task or "open" for task in columns["task"])
    return num_prompts, sorted(tasks)


def _reward(config: Config, tasks: Sequence[str]) -> list[str]:
    """Return the meaning of a score in words."""
    scorer = answer_scorer_config(config.scores).scorer
    if scorer == "auto" and config.scores.verifier is not None:
        verifier = config.scores.verifier
        return [REWARDS.get(verifier, f"verdict of {verifier}, 0 to 1")]
    if scorer == "auto":
        return [REWARDS[task] for task in tasks if task in REWARDS] or ["no verifier knows these tasks: no scores"]
    return [REWARDS.get(scorer, f"scorer {scorer}")]


def _method(run: Run) -> MethodAnswer | None:
    """Return the answer of the run's study of the method; None without a finished study."""
    from aft_ray.miniature.headline import headline, headline_points
    from aft_ray.miniature.page import PAGE
    from aft_ray.miniature.study import load_study, study_of_run

    folder = run.folder.child("miniature")
    if run.config.miniature is None or not folder.child(REPORT).exists(PAGE):
        return None
    study = load_study(folder)
    return MethodAnswer(
        sentences=tuple(headline(study)),
        points=tuple(headline_points(study)),
        num_questions=study.num_questions,
        num_proposals=study_of_run(run.config).evaluation.plan.num_proposals,
        page=f"../miniature/{REPORT}/{PAGE}",
    )


def print_results(run: Run, folder: Folder | None = None) -> None:
    """Print the end of a finished run from its report folder: the results, where they are, and what to try next."""
    from rich.console import Console

    folder = folder or run.folder.child(REPORT)
    found: dict[str, Any] = json.loads(folder.read_bytes("results.json"))
    console = Console()
    for title, table in _tables(found):
        console.print(f"\n{title}", style="bold", highlight=False)
        console.print(table)
    for sentence in found["method"]["sentences"] if found["method"] else ():
        console.print(f"- {sentence}", highlight=False)
    console.print(f"\nreport: {folder.location}/report.html\n\ntry next:", highlight=False, soft_wrap=True)
    for command in next_commands(run):
        console.print(f"  {_aft_ray()} {command}", highlight=False, soft_wrap=True)


def next_commands(run: Run) -> Iterator[str]:
    """Yield commands for after a run, with its own settings: serve it, ask it, and use own prompts or export it."""
    folder, serving, variants = _shown(run.folder), run.config.serving, run.config.training_set.variants
    config = f"--config {shlex.quote(f'{folder}/{RESOLVED}')}"
    yield f"serve {config}"
    elsewhere = "" if serving.port in (0, 8000) else f" --base-url http://127.0.0.1:{serving.port}"
    yield f'ask "Name three rivers in Africa, as bullets." --show-proposals{elsewhere}     (while it serves)'
    if run.config.prompts.source.startswith("packaged:"):
        study = "" if run.config.miniature is None else " --set miniature=null"
        yield f"run {config} --set {shlex.quote(f'run.dir={folder}-mine')} --set prompts.source=my_prompts.jsonl{study}"
    else:
        variant = "aft" if "aft" in variants else variants[-1]
        yield f"export {config} --variant {variant} --output {shlex.quote(f'exports/{run.folder.name}-{variant}')}"


def _shown(folder: Folder) -> str:
    """Return a folder as a command here can name it: a short relative path where there is one, else all of it."""
    try:
        below = folder.is_local and Path(folder.path).is_relative_to(Path.cwd())
    except FileNotFoundError:  # the working directory of a job may be gone by the time its report is written
        below = False
    return os.path.relpath(folder.path) if below else folder.location


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield the title and table of each result; the answer about the method, where there is one, comes last."""
    rewards = Table("model", "a single answer", "aggregated from its drafts")
    for system in found["systems"]:
        plan = f"  (K={system['num_proposals']}, L={system['num_layers']})" if system["num_layers"] else ""
        rewards.add_row(system["system"], _interval(system["single"]), f"{_interval(system['final'])}{plan}")
    yield f"{found['model']}: mean reward on {found['num_held_out_prompts']} held-out prompts [95 % interval]", rewards
    if found["perplexities"]:
        num_targets = found["perplexities"][0]["nats_per_token"]["num"]
        perplexities = Table("model, and what it sees", "perplexity")
        for one in found["perplexities"]:
            value = {"mean": one["perplexity"], "low": one["low"], "high": one["high"]}
            perplexities.add_row(one["name"], _interval(value))
        yield f"{found['model']}: perplexity of {num_targets} held-out targets, lower is easier", perplexities
    if found["method"]:
        points = found["method"]["points"]
        ways = list(dict.fromkeys(point["series"] for point in points))
        rates = {(point["row"], point["series"]): _interval(point) for point in points}
        method = Table("model", *ways)
        for row in dict.fromkeys(point["row"] for point in points):
            method.add_row(row, *(rates.get((row, way), "–") for way in ways))
        yield f"Does training to aggregate work? Right answers to {found['method']['num_questions']} questions", method


def _aft_ray() -> str:
    """Return the command as it can be typed here: its name where that is on PATH, else its path."""
    return "aft-ray" if shutil.which("aft-ray") else os.path.relpath(Path(sys.executable).parent / "aft-ray")


def _interval(value: Mapping[str, float | None]) -> str:
    """Return `0.47 [0.30, 0.66]` from mean, low and high."""
    mean, low, high = value["mean"], value["low"], value["high"]
    if mean is None:
        return "–"
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _scored_answers(run: Run, system: str) -> list[dict[str, Any]]:
    return run.folder.child("evaluation").child(system).child("scores").rows()


def _num_failed(run: Run, system: str) -> int:
    manifests = [run.manifest(f"evaluation/{system}/{stage}") for stage in ("answers", "scores")]
    return sum(manifest.num_failed for manifest in manifests if manifest is not None)


def _stages(run: Run) -> tuple[StageSummary, ...]:
    named = [(name, run.manifest(name)) for name in data_stages(run.config)]
    for system in systems_of(run):
        for stage in ("answers", "scores"):
            named.append((f"{stage}: {system.name}", run.manifest(f"evaluation/{system.name}/{stage}")))
    return tuple(_stage(name, manifest) for name, manifest in named if manifest is not None)


def _stage(name: str, manifest: Manifest) -> StageSummary:
    calls_a_model = manifest.completion_tokens > 0
    return StageSummary(
        name=name,
        rows_in=manifest.rows_in,
        rows_out=manifest.rows_out,
        rows_failed=manifest.num_failed,
        prompt_tokens=manifest.prompt_tokens if calls_a_model else None,
        completion_tokens=manifest.completion_tokens if calls_a_model else None,
        seconds=manifest.seconds,
        left_out={reason: count for reason, count in manifest.filtered.items() if reason != NOT_HELD_OUT},
    )


def _training(run: Run) -> tuple[TrainingSummary, ...]:
    return tuple(found for variant in run.config.training_set.variants if (found := _trained(run.folder, variant)))


def _trained(folder: Folder, variant: str) -> TrainingSummary | None:
    model, metrics = folder.child(f"model/{variant}"), folder.child(f"checkpoints/{variant}")
    if not model.exists("summary.json"):
        return None
    summary = json.loads(model.read_bytes("summary.json"))["summary"]
    return TrainingSummary(
        variant=variant,
        num_examples=summary["num_rows"],
        num_steps=summary["num_steps"],
        num_workers=summary["world_size"],
        startup_seconds=summary["startup_seconds"],
        seconds=summary["seconds"],
        num_tokens=summary["num_tokens"],
        num_trained_tokens=summary["num_trained_tokens"],
        curve=curve_of(metrics.json_lines("metrics.jsonl")),
        held_out=held_out_curves(metrics.json_lines("held_out.jsonl")),
    )


def _perplexities(run: Run, resampling: Mapping[str, int]) -> Sequence[ConditionPerplexity]:
    return summarise(read_scores(run, scored_models(run)), **resampling)


def _comparisons(scored: Mapping[str, list[ScoredAnswer]], resampling: Mapping[str, int]) -> tuple[Comparison, ...]:
    """Compare each system with the one before it, single and aggregated."""
    return tuple(
        compare((second, scored[second]), (first, scored[first]), of=of, **resampling)  # type: ignore[arg-type]
        for first, second in pairwise(scored)
        for of in ("single", "final")
    )


def _examples(run: Run, rows: Mapping[str, list[dict[str, Any]]]) -> list[Example]:
    """Choose drafts and aggregations of the AFT systems (of all systems where there is no AFT system)."""
    shown = [name for name in rows if "aft" in name] or list(rows)
    return [
        example
        for name in shown
        for example in choose_examples(name, rows[name], constraint_checks, num_examples=4, seed=run.config.run.seed)
    ]


def constraint_checks(row: Mapping[str, Any], text: str) -> list[Check]:
    """Return each constraint of a prompt of task `constraints` in words, and whether `text` meets it."""
    if row["task"] != "constraints":
        return []
    given = metadata_of(row)["constraints"]
    return [
        Check(name=describe(constraint), met=parsed.met_by(text))
        for constraint, parsed in zip(given, parse_all(given), strict=True)
    ]


def describe(constraint: Mapping[str, Any]) -> str:
    """Return `{"type": "num_bullets", "count": 3}` as `num bullets: 3`."""
    values = ", ".join(str(value) for key, value in constraint.items() if key != "type")
    return str(constraint["type"]).replace("_", " ") + (f": {values}" if values else "")


def _num_parameters(run: Run) -> int | None:
    """Count the parameters of the model to train in its folder; None for a hub id."""
    from aft_ray.models import num_parameters, resolve_model

    model = getattr(run.config.engine, "model", None)
    return num_parameters(Path(resolve_model(model, weights=False))) if model else None


def _hardware() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" + (f", {len(gpus)} x {gpus[0]}" if gpus else ", no GPU")
