"""Hours, GPUs and cost of a run from stated speeds, before anything was measured (`aft-ray plan`).

A model of N parameters takes 2 N operations for a token that it reads or writes, 6 N for one that it is trained on, and
4 N where only an adapter is trained, since the frozen weights need no gradient (Kaplan et al. 2020, section 2.1; the
attention's own operations, a few per cent at these lengths, are left out). A GPU does a stated share of its peak:

    seconds = 2 N * tokens / (utilization * peak)

So an 8B model writes 0.2 * 989e12 / 16e9 = 12,400 tokens a second on an H100. Start-up is not in it, nor are workers
that have nothing to do at the end of a step. Measured speeds replace stated ones: `estimate.tokens_per_second`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aft_ray.config import Config, EngineConfig, gpus_of
from aft_ray.data.proposals import parts
from aft_ray.data.scorers import gpus_of_scorer
from aft_ray.hub import split
from aft_ray.models import num_parameters

PEAK_TFLOPS = {"A100": 312, "B200": 2250, "H100": 989, "H200": 989, "L4": 121, "L40S": 362}
"""Dense bfloat16, from NVIDIA's data sheets (SXM where there are several)."""
LIST_PRICES = {"A100": 2.75, "B200": 14.24, "H100": 6.88, "H200": 7.91, "L4": 0.80, "L40S": 2.62}
"""US dollars per GPU and hour, on demand, of the smallest instance of AWS with it, divided by its GPUs (us-east-1, late
2025): a starting point. `estimate.usd_per_gpu_hour` has the price that is paid."""
PROMPT_ONLY = {"sft", "sft_reference"}
"""Variants whose examples show no proposals."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """What one step takes."""

    step: str
    read: float
    """Tokens that are read: prompts, scored answers, training examples."""
    written: float
    gpus: float
    """GPUs at work at a time; 0 for a remote endpoint."""
    gpu_hours: float | None
    """None for a model whose size is not known."""
    usd: float | None
    """None for a model whose size is not known, and for an endpoint without prices."""
    model: str = ""
    """Whose size the hours follow from. Empty where they do not follow from a size."""

    @property
    def hours(self) -> float | None:
        return None if self.gpu_hours is None or not self.gpus else self.gpu_hours / self.gpus


def price_of(config: Config) -> float:
    """Return the price of a GPU for an hour."""
    for stated in (config.estimate.usd_per_gpu_hour, config.run.usd_per_gpu_hour):
        if stated is not None:
            return stated
    return LIST_PRICES[config.estimate.gpu]


def billions_of(model: str, stated: Mapping[str, float]) -> float | None:
    """Return the parameters of a model in billions: as stated, as a local folder holds them, or from its name
    (`Llama-3.1-8B`, `smollm2-135m`)."""
    if model in stated:
        return stated[model]
    name = split(model)[0]
    if name in stated:
        return stated[name]
    held = num_parameters(Path(model).expanduser()) if model else None
    if held is not None:
        return held / 1e9
    found = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name.rpartition("/")[2].lower())
    return None if not found else float(found[-1][0]) / (1000 if found[-1][1] == "m" else 1)


def estimate(config: Config, num_prompts: int) -> Iterator[StepEstimate]:
    """Yield the steps that need a model, in order."""
    own, trained = config.estimate, max(num_prompts - config.prompts.held_out, 0)
    prompt, width = own.prompt_tokens, config.selection.num_proposals

    def answer(limit: int) -> int:
        return min(own.answer_tokens, limit)

    draft = answer(config.proposals.sampling.max_tokens)
    for part in parts(config.proposals) if config.makes_targets else ():
        if part.proposer.source == "on_policy":
            engine, placement = part.proposer.engine or config.engine, part.proposer.placement
            gpus = _gpus(config, placement.num_gpus, gpus_of(engine), placement.max_actors)
            written = num_prompts * part.num_proposals * draft
            yield _generation(config, part.stage_name, engine, gpus, num_prompts * prompt, written)
    if gpus_of_scorer(config) and config.makes_targets:
        read = num_prompts * config.proposals.num_per_prompt * (prompt + draft)
        yield _scores(config, read)
    target = answer(config.targets.sampling.max_tokens)
    if config.targets.source == "teacher" and config.makes_targets:
        engine, placement = config.targets.engine or config.engine, config.targets.placement
        gpus = _gpus(config, placement.num_gpus, gpus_of(engine), placement.max_actors)
        read, written = num_prompts * (prompt + width * draft), num_prompts * config.targets.num_candidates * target
        yield _generation(config, "targets", engine, gpus, read, written)
    lengths = [
        prompt + target + (0 if variant in PROMPT_ONLY else width * draft) for variant in config.training_set.variants
    ]
    yield _training(config, sum(trained_examples(config, trained, length) * length for length in lengths))
    plan = config.evaluation.plan
    systems = (1 + len(config.training_set.variants)) * _num_asked(config, num_prompts)
    if systems:
        final = answer(plan.final.max_tokens)
        _, engine_of_pool, replicas = config.serving.pools[0]
        engine = engine_of_pool or config.engine
        gpus = _gpus(config, replicas.num_gpus, gpus_of(engine), replicas.max_replicas)
        layers = systems * plan.num_layers * plan.num_proposals
        read = systems * prompt + layers * (prompt + plan.num_proposals * final)
        yield _generation(config, "evaluate", engine, gpus, read, systems * plan.num_samples * final)


def trained_examples(config: Config, num_examples: int, length: float) -> float:
    """Return how many examples of a length a variant is trained on, repeats included."""
    training = config.training
    if training.max_steps is None:
        return num_examples * training.num_epochs
    per_row = 1 if training.pack_length is None else max(training.pack_length / length, 1)
    rows_per_step = training.batch_size_per_worker * training.num_workers * training.gradient_accumulation_steps
    return training.max_steps * rows_per_step * per_row


def _num_asked(config: Config, num_prompts: int) -> int:
    """Return how many prompts the evaluation asks: of a set of its own without a limit, as many as the run has."""
    own = config.evaluation.prompts
    return config.prompts.held_out if own is None else own.limit or num_prompts


def _gpus(config: Config, setting: float | None, engine_gpus: int, most: int) -> float:
    """Return the GPUs that a step has at work at a time."""
    return min((engine_gpus if setting is None else setting) * most, config.estimate.num_gpus)


def _flops(config: Config, utilization: float) -> float:
    """Return the operations per second of one GPU."""
    return utilization * PEAK_TFLOPS[config.estimate.gpu] * 1e12


def _generation(
    config: Config, step: str, engine: EngineConfig, gpus: float, read: float, written: float
) -> StepEstimate:
    own = config.estimate
    if engine.type == "openai":
        prices = engine.prices
        usd = None if prices is None else (read * prices.prompt + written * prices.completion) / 1e6
        return StepEstimate(step=step, read=read, written=written, gpus=0, gpu_hours=0, usd=usd)
    seconds: float | None = None
    model = getattr(engine, "model", "")
    billions = billions_of(model, own.billions)
    if step in own.tokens_per_second:
        seconds = written / own.tokens_per_second[step]
    elif billions is not None:
        per_token = 2e9 * billions
        seconds = per_token * read / _flops(config, own.reading_utilization)
        seconds += per_token * written / _flops(config, own.generation_utilization)
    return _of_seconds(config, step, read, written, gpus, seconds, model)


def _scores(config: Config, read: float) -> StepEstimate:
    own, scores = config.estimate, config.scores
    gpus = _gpus(config, scores.placement.num_gpus, gpus_of_scorer(config), scores.placement.max_actors)
    model = scores.reward_model or ""
    if scores.scorer == "judge" and scores.judge is not None:
        model = getattr(scores.judge.engine, "model", "")
    elif scores.scorer == "likelihood":
        model = getattr(scores.likelihood.engine or config.engine, "model", "")
    seconds: float | None = None
    billions = billions_of(model, own.billions)
    if "scores" in own.tokens_per_second:
        seconds = read / own.tokens_per_second["scores"]
    elif billions is not None:
        seconds = 2e9 * billions * read / _flops(config, own.reading_utilization)
    return _of_seconds(config, "scores", read, 0, gpus, seconds, model)


def _training(config: Config, read: float) -> StepEstimate:
    own, training = config.estimate, config.training
    seconds: float | None = None
    model = getattr(config.engine, "model", "")
    billions = billions_of(model, own.billions)
    if "train" in own.tokens_per_second:
        seconds = read / own.tokens_per_second["train"]
    elif billions is not None:
        per_token = (6e9 if training.method == "full" else 4e9) * billions
        seconds = per_token * read / _flops(config, own.training_utilization)
    gpus = _gpus(config, training.gpus_per_worker, 1, training.num_workers)
    return _of_seconds(config, "train", read, 0, gpus, seconds, model)


def _of_seconds(
    config: Config, step: str, read: float, written: float, gpus: float, seconds: float | None, model: str
) -> StepEstimate:
    hours = None if seconds is None else seconds / 3600
    usd = None if hours is None else hours * price_of(config)
    measured = step in config.estimate.tokens_per_second
    return StepEstimate(
        step=step,
        read=read,
        written=written,
        gpus=gpus,
        gpu_hours=hours,
        usd=usd,
        model="" if measured else model,
    )
