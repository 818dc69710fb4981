"""selection -> targets: a teacher writes the aggregation to learn, from the prompt and its selected proposals.

in    + selected
out   + target, accepted_targets, pseudo_target, target_filter, length_action
on    the teacher's engine: a local model, or any OpenAI-compatible endpoint

The teacher writes `num_candidates` aggregations per prompt. With `keep: best`, the target is the finished one that the
verifier and the score prefer. The other policies keep only candidates that the verifier accepts: with the student as
its own teacher this is teacher-free AFT, and its acceptance rate is `num_accepted` / `num_candidates`. A target that
must not be trained on stays on its row, with the reason in `target_filter`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aft_ray.config import Config
from aft_ray.data.proposals import aggregator_hash, processed, sample_all
from aft_ray.data.scorers import build_scorer, scorer_settings, text_scorer_config
from aft_ray.data.scoring import Scored
from aft_ray.data.selection import selected_texts
from aft_ray.data.target_filters import why_left_out
from aft_ray.data.verifiers import verify
from aft_ray.engines import GenerateRequest, Sample, build_engine
from aft_ray.errors import InputError
from aft_ray.records import TARGETS, Message, Target, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import AggregatorTemplate, fit_aggregation, fit_prompt
from aft_ray.templates.loading import load_format

TEACHER_LAYER = 1
"""Layer from which the seeds of the teacher's samples are derived; proposals are layer 0."""
PSEUDO_LAYER = 2


def best_candidate(samples: Sequence[Sample], verified: Sequence[bool | None], scores: Sequence[float | None]) -> int:
    """Return the index of the candidate to keep.

    Candidates are compared by these criteria in turn: usable, finished, verified, scored, higher score, earlier.
    """

    def rank(i: int) -> tuple[bool, bool, bool, bool, float, int]:
        is_usable, score = not samples[i].error and bool(samples[i].text.strip()), scores[i]
        is_finished = samples[i].finish_reason == "stop"
        return is_usable, is_finished, bool(verified[i]), score is not None, score or 0.0, -i

    return max(range(len(samples)), key=rank)


class TargetWorker(RowWorker):
    """Lets the teacher write aggregations, and keeps those that the policy selects."""

    def __init__(self, config: Config) -> None:
        self.config, self.templates, self.seed = config.targets, config.templates, config.run.seed
        self.engine_config = config.targets.engine or config.engine
        self.engine = build_engine(self.engine_config)
        self.format = load_format(self.engine.info.tokenizer, config.templates.in_context)
        self.template = AggregatorTemplate.load(config.templates.aggregator)
        # A judge compares the candidates of one prompt, so it only scores where there are several to choose from.
        is_judged = config.scores.scorer == "judge" and self.config.num_candidates > 1 and self.config.keep == "best"
        scorer = config.scores if is_judged else text_scorer_config(config.scores)
        self.scorer = build_scorer(scorer, seed=config.run.seed)
        self.room = self.engine.info.max_model_len - self.config.sampling.max_tokens

    async def process(self, row: dict[str, Any]) -> Processed:
        proposals = selected_texts(row)
        fitted = fit_aggregation(
            self.format, self.template, row["messages"], proposals, self.room, self.templates.length_policy
        )
        samples = await self._ask(row, fitted.prompt_ids, fitted.messages, TEACHER_LAYER, self.config.num_candidates)
        targets, scored = await self._targets(row, samples)
        kept, accepted = self._keep(samples, targets)
        pseudo, pseudo_samples = await self._pseudo(row) if self.config.pseudo else (None, [])
        proposal_scores = [row["proposals"][index]["score"] for index in row["selected"]]
        reason = why_left_out(kept, proposals, proposal_scores, self.config.filters)
        if self.config.keep != "best" and not kept.num_accepted:
            reason = "no accepted candidate"
        made = {
            **row,
            "target": to_row(kept),
            "accepted_targets": [to_row(target) for target in accepted],
            "pseudo_target": to_row(pseudo) if pseudo else None,
            "target_filter": reason,
            "length_action": fitted.action,
        }
        done = processed(made, [*samples, *pseudo_samples], self.engine_config)
        return dataclasses.replace(
            done,
            prompt_tokens=done.prompt_tokens + scored.prompt_tokens,
            completion_tokens=done.completion_tokens + scored.completion_tokens,
            cost_usd=done.cost_usd + scored.cost_usd,
        )

    async def _ask(
        self, row: Mapping[str, Any], ids: Sequence[int], messages: Sequence[Message], layer: int, num: int
    ) -> list[Sample]:
        request = GenerateRequest(
            request_id=f"targets-{row['prompt_id']}-{layer}",
            prompt_ids=tuple(ids),
            messages=tuple(messages),
            sampling=self.config.sampling.also_stopping_at(self.format.stop_strings),
            seeds=tuple(derive_seed(self.seed, row["prompt_id"], layer, i) for i in range(num)),
            adapter=self.config.adapter,
        )
        return await sample_all(self.engine, request)

    async def _pseudo(self, row: Mapping[str, Any]) -> tuple[Target, list[Sample]]:
        """Return one answer to the prompt alone. It has no score, since there is only one candidate."""
        ids = fit_prompt(self.format, row["messages"], self.room)
        (sample,) = samples = await self._ask(row, ids, row["messages"], PSEUDO_LAYER, 1)
        text = sample.text.strip()
        return self._target(sample, verify(row, text) if text else None, None, samples, None), samples

    async def _targets(self, row: Mapping[str, Any], samples: Sequence[Sample]) -> tuple[list[Target], Scored]:
        texts = [sample.text.strip() for sample in samples]
        verified = [verify(row, text) if text else None for text in texts]
        known = [value for value in verified if value is not None]
        scored = await self.scorer.score(row, texts)
        num_accepted = sum(known) if known else None
        targets = [
            self._target(sample, accepted, score.value if text else None, samples, num_accepted)
            for text, sample, accepted, score in zip(texts, samples, verified, scored.scores, strict=True)
        ]
        return targets, scored

    def _target(
        self,
        sample: Sample,
        verified: bool | None,
        score: float | None,
        samples: Sequence[Sample],
        num_accepted: int | None,
    ) -> Target:
        return Target(
            text=sample.text.strip(),
            model=self.config.adapter or self.engine.info.model,
            finish_reason=sample.finish_reason,
            num_tokens=sample.num_tokens,
            verified=verified,
            score=score,
            num_candidates=len(samples),
            num_accepted=num_accepted,
        )

    def _keep(self, samples: Sequence[Sample], targets: Sequence[Target]) -> tuple[Target, list[Target]]:
        """Return the target and, with `keep: all`, the other accepted candidates."""
        best = best_candidate(samples, [t.verified for t in targets], [t.score for t in targets])
        if self.config.keep == "best":
            return targets[best], []
        if all(target.verified is None for target in targets):
            raise InputError(
                f"targets.keep {self.config.keep} needs a verifier for the prompt's task; set targets.keep to best"
            )
        accepted = [target for target in targets if target.verified and target.finish_reason != "length"]
        if not accepted:
            return targets[best], []
        if self.config.keep == "shortest":
            return min(accepted, key=lambda target: target.num_tokens), []
        others = [target for target in accepted[1:] if target.text != accepted[0].text]
        return accepted[0], others if self.config.keep == "all" else []

    async def check(self) -> None:
        await self.engine.check()
        await self.scorer.check()


class ReferenceWorker(RowWorker):
    """Uses the prompt's reference answer as the target, without a model."""

    def __init__(self, config: Config) -> None:
        self.filters = config.targets.filters

    async def process(self, row: dict[str, Any]) -> Processed:
        if not row["reference"]:
            raise InputError("targets.source is reference, but this prompt has no reference answer")
        target = Target(
            text=row["reference"],
            model="reference",
            finish_reason="stop",
            num_tokens=0,
            verified=verify(row, row["reference"]),
            score=None,
            num_candidates=1,
            num_accepted=None,
        )
        made = {
            **row,
            "target": to_row(target),
            "accepted_targets": [],
            "pseudo_target": None,
            "target_filter": why_left_out(target, selected_texts(row), [], self.filters),
            "length_action": None,
        }
        return Processed(rows=[made])


def stage(run: Run) -> Stage:
    """Return the targets stage of a run."""
    config = run.config
    engine = config.targets.engine or config.engine
    return Stage(
        name="targets",
        source=run.folder.child("selection"),
        output=run.folder.child("targets"),
        schema=TARGETS,
        settings={
            "targets": config.targets.model_dump(mode="json", exclude={"placement", "engine"}),
            "scorer": scorer_settings(config),
            "engine": engine.identity(),
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed,
        },
        worker=partial(ReferenceWorker if config.targets.source == "reference" else TargetWorker, config),
        placement=config.targets.placement,
    )
