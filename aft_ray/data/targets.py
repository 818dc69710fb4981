"""selection -> targets: the aggregation to learn, written by the teacher from prompt + selected proposals.

in    + selected
out   + target: {text, model, finish_reason, num_tokens, verified, score, num_candidates}; length_action
on    the teacher's engine: a local model, or any OpenAI-compatible endpoint

The teacher writes `num_candidates` aggregations of one prompt; kept is the best of them: finished before truncated,
then by the verifier, then by lot of the seeds. Without a verifier for the task the first finished one is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aft_ray.config import EngineConfig, ScoresConfig, TargetsConfig, TemplatesConfig
from aft_ray.data.proposals import aggregator_hash, processed, sample_all
from aft_ray.data.scorers import build_scorer, verify
from aft_ray.data.selection import selected_texts
from aft_ray.engines import GenerateRequest, Sample, build_engine
from aft_ray.records import TARGETS, Target, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.stages import Processed, Stage
from aft_ray.templates import AggregatorTemplate, fit_aggregation
from aft_ray.templates.loading import load_format

TEACHER_LAYER = 1
"""Seeds of the teacher's samples are those of layer 1: proposals are layer 0."""


def best_candidate(samples: Sequence[Sample], verified: Sequence[bool | None], scores: Sequence[float | None]) -> int:
    """Index of the candidate to keep: usable, finished, verified, highest score, first; in that order of weight."""

    def rank(i: int) -> tuple[bool, bool, bool, float, int]:
        usable = not samples[i].error and bool(samples[i].text.strip())
        return usable, samples[i].finish_reason == "stop", bool(verified[i]), scores[i] or 0.0, -i

    return max(range(len(samples)), key=rank)


class TargetWorker:
    """Writes one target per row."""

    def __init__(
        self,
        config: TargetsConfig,
        scores: ScoresConfig,
        engine: EngineConfig,
        templates: TemplatesConfig,
        seed: int,
    ) -> None:
        self.config, self.templates, self.seed = config, templates, seed
        self.engine = build_engine(engine)
        self.format = load_format(self.engine.info.tokenizer, templates.in_context)
        self.template = AggregatorTemplate.load(templates.aggregator)
        self.scorer = build_scorer(scores)

    async def process(self, row: dict[str, Any]) -> Processed:
        room = self.engine.info.max_model_len - self.config.sampling.max_tokens
        fitted = fit_aggregation(
            self.format, self.template, row["messages"], selected_texts(row), room, self.templates.length_policy
        )
        request = GenerateRequest(
            request_id=f"targets-{row['prompt_id']}",
            prompt_ids=tuple(fitted.prompt_ids),
            messages=tuple(fitted.messages),
            sampling=self.config.sampling.also_stopping_at(self.format.stop_strings),
            seeds=tuple(
                derive_seed(self.seed, row["prompt_id"], TEACHER_LAYER, i) for i in range(self.config.num_candidates)
            ),
            adapter=self.config.adapter,
        )
        samples = await sample_all(self.engine, request)
        target = self._best(row, samples)
        return processed({**row, "target": to_row(target), "length_action": fitted.action}, samples)

    def _best(self, row: Mapping[str, Any], samples: Sequence[Sample]) -> Target:
        texts = [sample.text.strip() for sample in samples]
        verified = [verify(row, text) for text in texts]
        scores = [score.value for score in self.scorer.score(row, texts)]
        best = best_candidate(samples, verified, scores)
        return Target(
            text=texts[best],
            model=self.config.adapter or self.engine.info.model,
            finish_reason=samples[best].finish_reason,
            num_tokens=samples[best].num_tokens,
            verified=verified[best],
            score=scores[best],
            num_candidates=len(samples),
        )

    async def check(self) -> None:
        await self.engine.check()


def stage(run: Run) -> Stage:
    """The targets stage of a run."""
    config = run.config
    engine = config.targets.engine or config.engine
    return Stage(
        name="targets",
        source=run.folder.child("selection"),
        output=run.folder.child("targets"),
        schema=TARGETS,
        settings={
            "targets": config.targets.model_dump(mode="json", exclude={"placement", "engine"}),
            "scorer": config.scores.scorer,
            "engine": engine.model_dump(mode="json"),
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed,
        },
        worker=partial(TargetWorker, config.targets, config.scores, engine, config.templates, config.run.seed),
        placement=config.targets.placement,
    )
