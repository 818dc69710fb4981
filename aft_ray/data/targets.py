"""selection -> targets: a teacher writes the aggregation to learn, from the prompt and its selected proposals.

in    + selected
out   + target, accepted_targets, pseudo_target, target_filter, length_action, candidates
on    the teacher's engine: a local model, or any OpenAI-compatible endpoint

The teacher writes `num_candidates` aggregations per prompt. With `keep: best`, the target is the finished one that the
verifier and the score prefer. The other policies keep only candidates that the verifier accepts: with the student as
its own teacher this is teacher-free AFT, and its acceptance rate is `num_accepted` / `num_candidates`. A target that
must not be trained on stays on its row, with the reason in `target_filter`.

Where the choice or a filter needs scores (`Config.scores_targets`), the stage `target_scores` follows, since a worker
holds one model: it scores the candidates, and makes the choice again with their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aft_ray.config import Config, TargetsConfig, gpus_of
from aft_ray.data.proposals import aggregator_hash, bill, sample_all
from aft_ray.data.selection import selected_texts
from aft_ray.data.target_filters import why_left_out
from aft_ray.data.verifiers import off_loop, verifier_settings, verify
from aft_ray.engines import GenerateRequest, Sample, build_engine
from aft_ray.engines.endpoint_reply import REFUSAL, quoted
from aft_ray.errors import AftError, InputError
from aft_ray.models import engine_identity, identity
from aft_ray.records import TARGETS, Message, Spent, Target, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import AggregatorTemplate, fit_aggregation, fit_prompt
from aft_ray.templates.loading import load_format

TEACHER_LAYER = 1
"""Layer from which the seeds of the teacher's samples are derived; proposals are layer 0."""
PSEUDO_LAYER = 2


def best_candidate(candidates: Sequence[Target], finish_reasons: Sequence[str] = ("stop",)) -> Target:
    """Return the candidate to keep.

    Candidates are compared by these criteria in turn: not empty, finished (ended for one of the `finish_reasons`),
    verified, scored, higher score, earlier.
    """

    def rank(i: int) -> tuple[bool, bool, bool, bool, float, int]:
        one = candidates[i]
        is_finished = one.finish_reason in finish_reasons
        return bool(one.text.strip()), is_finished, bool(one.verified), one.score is not None, one.score or 0.0, -i

    return candidates[max(range(len(candidates)), key=rank)]


def choose(
    candidates: Sequence[Target], keep: str, finish_reasons: Sequence[str] = ("stop",)
) -> tuple[Target, list[Target]]:
    """Return the target and, with `keep: all`, the other accepted candidates."""
    best = best_candidate(candidates, finish_reasons)
    if keep == "best":
        return best, []
    if all(target.verified is None for target in candidates):
        raise InputError(f"targets.keep {keep} needs a verifier for the prompt's task; set targets.keep to best")
    accepted = [target for target in candidates if target.verified and target.finish_reason in finish_reasons]
    if not accepted:
        return best, []
    if keep == "shortest":
        return min(accepted, key=lambda target: target.num_tokens - target.num_reasoning_tokens), []
    others = [target for target in accepted[1:] if target.text != accepted[0].text]
    return accepted[0], others if keep == "all" else []


def chosen(row: Mapping[str, Any], candidates: Sequence[Target], config: TargetsConfig) -> dict[str, Any]:
    """Return the columns that follow from the candidates and their scores: target, accepted_targets, target_filter."""
    kept, accepted = choose(candidates, config.keep, config.filters.finish_reasons)
    scores = [row["proposals"][index]["score"] for index in row["selected"]]
    reason = why_left_out(kept, selected_texts(row), scores, config.filters)
    if config.keep != "best" and not kept.num_accepted:
        reason = "no accepted candidate"
    return {
        "target": to_row(kept),
        "accepted_targets": [to_row(target) for target in accepted],
        "target_filter": reason,
    }


def why_unusable(row: Mapping[str, Any]) -> str | None:
    """Return why the target of a row must not be trained on, with an endpoint's own words for a refusal; or None."""
    reason: str | None = row["target_filter"]
    return f"{reason}: {quoted(row['target']['text'])}" if reason == f"finish reason {REFUSAL}" else reason


class TargetWorker(RowWorker):
    """Lets the teacher write aggregations, and keeps those that the policy selects."""

    def __init__(self, config: Config) -> None:
        self.config, self.templates, self.seed = config.targets, config.templates, config.run.seed
        self.engine_config = config.targets.engine or config.engine
        self.engine = build_engine(self.engine_config, adapters=[self.config.adapter] if self.config.adapter else [])
        self.format = load_format(self.engine.info)
        self.template = AggregatorTemplate.load(config.templates.aggregator)
        self.scores_targets, self.verifier = config.scores_targets, config.scores.verifier
        self.room = self.engine.info.max_model_len - self.config.sampling.max_tokens

    async def process(self, row: dict[str, Any]) -> Processed:
        proposals = selected_texts(row)
        fitted = fit_aggregation(
            self.format, self.template, row["messages"], proposals, self.room, self.templates.length_policy
        )
        samples = await self._ask(row, fitted.prompt_ids, fitted.messages, TEACHER_LAYER, self.config.num_candidates)
        spent = bill(samples)
        try:
            candidates = await self._candidates(row, samples)
            made = {**row, **chosen(row, candidates, self.config), "length_action": fitted.action}
            pseudo, pseudo_samples = await self._pseudo(row) if self.config.pseudo else (None, [])
        except AftError as error:
            error.spent = spent + (error.spent or Spent())
            raise
        made["pseudo_target"] = to_row(pseudo) if pseudo else None
        made["candidates"] = [to_row(candidate) for candidate in candidates] if self.scores_targets else []
        return Processed(rows=[made], unusable=why_unusable(made), **(spent + bill(pseudo_samples)).counts)

    async def _ask(
        self, row: Mapping[str, Any], ids: Sequence[int], messages: Sequence[Message], layer: int, num: int
    ) -> list[Sample]:
        request = GenerateRequest(
            request_id=f"targets-{row['prompt_id']}-{layer}",
            prompt_ids=tuple(ids),
            messages=tuple(messages),
            sampling=self.config.sampling.also_stopping_at(self.format.stop_strings),
            seeds=tuple(derive_seed(self.seed, row["prompt_id"], layer, i) for i in range(num)),
            stop_ids=self.format.stop_ids,
            adapter=self.config.adapter,
        )
        return await sample_all(self.engine, request)

    async def _pseudo(self, row: Mapping[str, Any]) -> tuple[Target, list[Sample]]:
        """Return one answer to the prompt alone."""
        ids = fit_prompt(self.format, row["messages"], self.room)
        (sample,) = samples = await self._ask(row, ids, row["messages"], PSEUDO_LAYER, 1)
        text = sample.text.strip()
        verified = await off_loop(verify, row, text, self.verifier) if text else None
        return self._target(sample, verified, samples, None), samples

    async def _candidates(self, row: Mapping[str, Any], samples: Sequence[Sample]) -> list[Target]:
        texts = [sample.text.strip() for sample in samples]
        verified = [await off_loop(verify, row, text, self.verifier) if text else None for text in texts]
        known = [value for value in verified if value is not None]
        num_accepted = sum(known) if known else None
        return [
            self._target(sample, accepted, samples, num_accepted)
            for sample, accepted in zip(samples, verified, strict=True)
        ]

    def _target(
        self,
        sample: Sample,
        verified: bool | None,
        samples: Sequence[Sample],
        num_accepted: int | None,
    ) -> Target:
        return Target(
            text=sample.text.strip(),
            model=self.config.adapter or self.engine.info.model,
            finish_reason=sample.finish_reason,
            num_tokens=sample.num_tokens,
            verified=verified,
            score=None,
            num_candidates=len(samples),
            num_accepted=num_accepted,
            reasoning=sample.reasoning or None,
            num_reasoning_tokens=sample.num_reasoning_tokens,
            usage_estimated=sample.usage_estimated,
        )

    async def check(self) -> None:
        await self.engine.check()

    async def close(self) -> None:
        await self.engine.close()


class ReferenceWorker(RowWorker):
    """Uses the prompt's reference answer as the target, without a model."""

    def __init__(self, config: Config) -> None:
        self.config, self.scores_targets = config.targets, config.scores_targets
        self.verifier = config.scores.verifier

    async def process(self, row: dict[str, Any]) -> Processed:
        if not row["reference"]:
            raise InputError("targets.source is reference, but this prompt has no reference answer")
        target = Target(
            text=row["reference"],
            model="reference",
            finish_reason="stop",
            num_tokens=0,
            verified=await off_loop(verify, row, row["reference"], self.verifier),
            score=None,
            num_candidates=1,
            num_accepted=None,
        )
        made = {
            **row,
            **chosen(row, [target], self.config.model_copy(update={"keep": "best"})),
            "pseudo_target": None,
            "length_action": None,
            "candidates": [to_row(target)] if self.scores_targets else [],
        }
        return Processed(rows=[made], unusable=why_unusable(made))


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
            "targets": config.targets.model_dump(mode="json", exclude={"placement", "engine"})
            | {"adapter": identity(config.targets.adapter)},
            "engine": engine_identity(engine),
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed,
        }
        | verifier_settings(config.scores.verifier),
        worker=partial(ReferenceWorker if config.targets.source == "reference" else TargetWorker, config),
        placement=config.targets.placement,
        must_yield=True,
        gpus=gpus_of(engine) if config.targets.source == "teacher" else 0,
        is_light=config.targets.source == "reference",
    )


def last_stage(config: Config) -> str:
    """Return the folder that holds what is to be learnt: `target_scores` where targets are scored, else `targets`, or
    `prompts` where their own answers are.
    """
    if not config.makes_targets:
        return "prompts"
    return "target_scores" if config.scores_targets else "targets"
