"""prompts -> proposals: drafts sampled from the model to be trained (on-policy).

in    prompt_id, messages, reference, task, metadata
out   + proposals: list of {text, source, model, seed, finish_reason, num_prompt_tokens, num_tokens, error, ...}
on    one engine per actor: CPU or `placement.num_gpus` GPUs

Every prompt is one request for N samples with derived seeds, so its ids are computed once; a failed sample is kept as
a proposal with `error`, a prompt without a single answer fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from aft_ray.config import EngineConfig, ProposalsConfig, TemplatesConfig
from aft_ray.engines import Engine, GenerateRequest, Sample, build_engine
from aft_ray.errors import EngineError
from aft_ray.records import PROPOSALS, Message, Proposal, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.stages import Processed, Stage
from aft_ray.templates import AggregatorTemplate, InContextPrompt, fit_prompt
from aft_ray.templates.loading import load_format


def to_proposal(sample: Sample, model: str) -> Proposal:
    """A sample as the record that is stored."""
    return Proposal(
        text=sample.text.strip(),
        source="on-policy",
        model=model,
        seed=sample.seed,
        finish_reason=sample.finish_reason,
        num_prompt_tokens=sample.num_prompt_tokens,
        num_tokens=sample.num_tokens,
        error=sample.error,
    )


async def sample_all(engine: Engine, request: GenerateRequest) -> list[Sample]:
    """All samples of a request, by index. Raises EngineError when none of them succeeded."""
    samples = [event async for event in engine.generate(request) if isinstance(event, Sample)]
    if all(sample.error for sample in samples):
        raise EngineError(f"none of {len(samples)} samples succeeded; the first: {samples[0].error}")
    return sorted(samples, key=lambda sample: sample.index)


def processed(row: dict[str, Any], samples: Sequence[Sample]) -> Processed:
    """The row made from these samples, with what they cost."""
    return Processed(
        rows=[row],
        prompt_tokens=sum(sample.num_prompt_tokens for sample in samples),
        completion_tokens=sum(sample.num_tokens for sample in samples),
    )


class ProposalWorker:
    """Samples N proposals per row."""

    def __init__(self, config: ProposalsConfig, engine: EngineConfig, templates: TemplatesConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.engine = build_engine(engine)
        self.format = load_format(self.engine.info.tokenizer, templates.in_context, config.style)

    async def process(self, row: dict[str, Any]) -> Processed:
        samples = await sample_all(self.engine, self._request(row["prompt_id"], row["messages"]))
        name = self.config.adapter or self.engine.info.model
        proposals = [to_row(to_proposal(sample, name)) for sample in samples]
        return processed({**row, "proposals": proposals}, samples)

    def _request(self, prompt_id: str, messages: Sequence[Message]) -> GenerateRequest:
        room = self.engine.info.max_model_len - self.config.sampling.max_tokens
        return GenerateRequest(
            request_id=f"proposals-{prompt_id}",
            prompt_ids=tuple(fit_prompt(self.format, messages, room)),
            messages=tuple(messages),
            sampling=self.config.sampling.also_stopping_at(self.format.stop_strings),
            seeds=tuple(derive_seed(self.seed, prompt_id, 0, i) for i in range(self.config.num_per_prompt)),
            adapter=self.config.adapter,
        )

    async def check(self) -> None:
        await self.engine.check()


def stage(run: Run) -> Stage:
    """The proposals stage of a run."""
    config = run.config
    engine = config.proposals.engine or config.engine
    return Stage(
        name="proposals",
        source=run.folder.child("prompts"),
        output=run.folder.child("proposals"),
        schema=PROPOSALS,
        settings={
            "proposals": config.proposals.model_dump(mode="json", exclude={"placement", "engine"}),
            "engine": engine.model_dump(mode="json"),
            "seed": config.run.seed,
            "in_context": InContextPrompt.load(config.templates.in_context).hash,
        },
        worker=partial(ProposalWorker, config.proposals, engine, config.templates, config.run.seed),
        placement=config.proposals.placement,
    )


def aggregator_hash(templates: TemplatesConfig) -> str:
    """The hash of the aggregator template in force, for fingerprints and cards."""
    return AggregatorTemplate.load(templates.aggregator).hash
