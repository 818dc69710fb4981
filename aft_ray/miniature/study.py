"""The study: the whole method from one base model, with several seeds, through the ordinary steps of a run.

    run_study(load_config(Path("configs/miniature/method.yaml")), num_seeds=3)

    runs/miniature/seed-1/        a whole run, with its own report
    runs/miniature/seed-2/ ...
    runs/miniature/report/        miniature.html and results.json: all seeds together

Every seed draws its own questions, samples its own proposals and trains its own models; the base model is the same.
Run again, it continues: each seed's run resumes where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from aft_ray.config import Config, load_config, validate
from aft_ray.errors import InputError
from aft_ray.evaluation.perplexity import TargetScore
from aft_ray.evaluation.perplexity_stage import read_scores
from aft_ray.miniature.answers import Answered, Study, study_of
from aft_ray.pipeline.cluster import RaySession
from aft_ray.pipeline.evaluate import SINGLE, scored_models, systems_of
from aft_ray.runs import RESOLVED, Run, commit
from aft_ray.storage import Folder


def study_of_run(config: Config) -> Config:
    """Return the settings of the study that a run names; its folder is `miniature/` in the run's folder.

    Raises ConfigError when the study's YAML cannot be read.
    """
    assert config.miniature is not None
    return load_config(Path(config.miniature), [f"run.dir={config.run.dir}/miniature"])


def run_study(config: Config, num_seeds: int, run_line: Callable[[Config], object]) -> Study:
    """Run seeds `run.seed`, `run.seed` + 1, ... into folders below `run.dir`, and write the page over all of them.

    `run_line` takes one run through every step: it is passed in because a run may itself hold a study. A connection to
    Ray that is already open is used. A finished study is read again in seconds, without starting Ray.
    """
    from aft_ray.miniature.page import write_page

    started = time.monotonic()
    configs = [_of_seed(config, config.run.seed + number) for number in range(num_seeds)]
    with RaySession(config) as session:
        if not all(_has_report(one) for one in configs):
            session.connect()  # once for all seeds
        for one in configs:
            print(f"── seed {one.run.seed} {'─' * 60}", file=sys.stderr)
            run_line(one)
    minutes = (time.monotonic() - started) / 60
    study = collect(configs)
    write_page(study, Folder.at(config.run.dir).child("report"), config, commit(), minutes)
    return study


def _of_seed(config: Config, seed: int) -> Config:
    run = config.run.model_copy(update={"dir": f"{config.run.dir}/seed-{seed}", "seed": seed})
    return config.model_copy(update={"run": run})


def _has_report(config: Config) -> bool:
    return Folder.at(config.run.dir).child("report").exists("report.html")


def load_study(folder: Folder) -> Study:
    """Return the finished study below `folder`, read from the runs of its seeds again."""
    names = [name for name in folder.folder_names() if name.startswith("seed-")]
    runs = [folder.child(name) for name in sorted(names, key=lambda name: int(name.removeprefix("seed-")))]
    if not runs:
        raise InputError(f"{folder.location}: no finished study there (no folder seed-N)")
    return collect([_resolved(run) for run in runs])


def _resolved(run: Folder) -> Config:
    settings = yaml.safe_load(run.read_bytes(RESOLVED))
    settings["run"]["dir"] = run.location
    config: Config = validate(Config, settings, origin=f"{run.location}/{RESOLVED}")
    return config


def collect(configs: list[Config]) -> Study:
    """What the finished runs of several seeds hold."""
    answered: list[Answered] = []
    scores: dict[int, list[TargetScore]] = {}
    pseudo: list[bool] = []
    for config in configs:
        run = Run(config, Folder.at(config.run.dir))
        evaluation = run.folder.child("evaluation")
        for model in dict.fromkeys(system.model for system in systems_of(run)):
            alone = evaluation.child(f"{model}{SINGLE}").child("answers").rows()
            singles = {row["prompt_id"]: row["answer"] for row in alone}
            rows = evaluation.child(model).child("answers").rows()
            answered += [Answered.of(row, singles[row["prompt_id"]], model, config.run.seed) for row in rows]
        scores[config.run.seed] = read_scores(run, scored_models(run))
        targets = [row["pseudo_target"] for row in run.folder.child("targets").rows()]
        pseudo += [bool(target["verified"]) for target in targets if target]
    return study_of(answered, scores, pseudo, configs[0].evaluation.num_bootstrap)
