"""prompts -> proposals: one or several proposers give draft answers to every prompt.

in    prompt_id, messages, reference, task, metadata, split, responses
out   + proposals: list of {text, source, model, seed, finish_reason, num_prompt_tokens, num_tokens, error, round, ...}
on    one engine per actor, on CPU or `placement.num_gpus` GPUs; off-policy proposals need no engine

An on-policy proposer makes one request per prompt for all its samples, so the prompt is processed once. Each sample has
its own derived seed, and a failed sample is kept as a proposal with an `error`. An off-policy proposer takes the
answers that came with the prompt. Several proposers run as consecutive stages, and each adds its share:

    prompts -> proposals-part-1 -> proposals-part-2 -> proposals

The last one counts all proposals of a prompt and applies `proposals.too_few`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aft_ray.config import Config, EngineConfig, ProposalsConfig, ProposerConfig, TemplatesConfig, gpus_of
from aft_ray.data import DATA_STAGES
from aft_ray.engines import Engine, GenerateRequest, Sample, build_engine
from aft_ray.errors import EngineError, InputError
from aft_ray.inference.shares import apportion
from aft_ray.models import engine_identity, identity
from aft_ray.records import PROPOSALS, Message, Proposal, Spent, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import AggregatorTemplate, InContextPrompt, fit_prompt
from aft_ray.templates.chat import Style
from aft_ray.templates.loading import load_format
from aft_ray.templates.thinking import split_thinking


async def sample_all(engine: Engine, request: GenerateRequest) -> list[Sample]:
    """Return all samples of a request, sorted by index, each with its thinking apart from its answer.

    Raises EngineError, with what was spent, if none of them succeeded.
    """
    samples = [thinking_apart(event) async for event in engine.generate(request) if isinstance(event, Sample)]
    if all(sample.error for sample in samples):
        error = EngineError(f"none of {len(samples)} samples succeeded; the first: {samples[0].error}")
        error.spent = bill(samples)
        raise error
    return sorted(samples, key=lambda sample: sample.index)


def thinking_apart(sample: Sample) -> Sample:
    """Return the sample with what its text holds of thinking moved to `reasoning`, and its share of the tokens."""
    thinking, answer = split_thinking(sample.text)
    if answer == sample.text:
        return sample
    written = sample.num_tokens - sample.num_reasoning_tokens
    return dataclasses.replace(
        sample,
        text=answer,
        reasoning="\n\n".join(filter(None, (sample.reasoning, thinking))),
        num_reasoning_tokens=sample.num_reasoning_tokens + round(written * len(thinking) / len(sample.text)),
    )


def bill(samples: Sequence[Sample]) -> Spent:
    """Return what the samples cost together, lost tries included."""
    own = (Spent(prompt_tokens=s.num_prompt_tokens, completion_tokens=s.num_tokens) for s in samples)
    return sum((s.spent or tokens for s, tokens in zip(samples, own, strict=True)), start=Spent())


def processed(row: dict[str, Any], samples: Sequence[Sample]) -> Processed:
    """Return the row with what the samples it was made from cost."""
    return Processed(rows=[row], **bill(samples).counts)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One proposer and its position among the others."""

    proposer: ProposerConfig
    num_proposals: int
    """Number of proposals per prompt from this proposer."""
    index: int
    num_before: int
    """Number of proposals per prompt from the proposers before it."""
    is_last: bool

    @property
    def stage_name(self) -> str:
        return "proposals" if self.is_last else f"proposals-part-{self.index + 1}"


def parts(config: ProposalsConfig) -> list[Part]:
    """Return the proposers in order, each with its number of proposals: its share of `num_per_prompt`, at least one."""
    proposers = config.all_proposers
    counts = apportion(config.num_per_prompt, [proposer.share for proposer in proposers], least=1)
    return [
        Part(
            proposer=proposer,
            num_proposals=counts[i],
            index=i,
            num_before=sum(counts[:i]),
            is_last=i == len(counts) - 1,
        )
        for i, proposer in enumerate(proposers)
    ]


def data_stages(config: Config) -> list[str]:
    """Return the folder names of all data stages of a run, in order. Each proposer has a folder of its own, and
    `target_scores` is among them only where targets are scored. Where the prompts' own answers are trained on, there
    are no stages between `prompts` and `training_set`.
    """
    if not config.makes_targets:
        return [DATA_STAGES[0], DATA_STAGES[-1]]
    names = [part.stage_name for part in parts(config.proposals)]
    stages = [stage for stage in DATA_STAGES if stage != "target_scores" or config.scores_targets]
    place = stages.index("proposals")
    return [*stages[:place], *names, *stages[place + 1 :]]


def num_usable(proposals: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of proposals that did not fail and are not empty."""
    return sum(bool(proposal["text"]) and not proposal["error"] for proposal in proposals)


class ProposalWorker(RowWorker):
    """Adds the proposals of one proposer to a row; the last proposer applies `too_few`."""

    def __init__(self, config: Config, part: Part) -> None:
        self.config, self.part = config.proposals, part
        self.seed, self.needed = config.run.seed, config.selection.num_proposals
        sampled = part.proposer.source == "on_policy"
        self.writer: Sampler | Collector = Sampler(config, part) if sampled else Collector(config, part)

    async def process(self, row: dict[str, Any]) -> Processed:
        before = row.get("proposals") or []
        num = self.part.num_proposals
        if self.part.is_last and self.config.too_few == "fill":
            num += self.part.num_before - num_usable(before)
        done = await self.writer.write(row, num)
        row = {**row, "proposals": before + done.rows[0]["proposals"]}
        too_few = num_usable(row["proposals"]) < self.needed and self.part.is_last
        if too_few and self.config.too_few == "drop":
            return dataclasses.replace(done, rows=[], filtered="too few proposals")
        if too_few and (self.config.too_few == "fail" or not num_usable(row["proposals"])):
            error = InputError(
                f"{num_usable(row['proposals'])} usable proposals, but selection.num_proposals is {self.needed}"
            )
            error.spent = done
            raise error
        return dataclasses.replace(done, rows=[row])

    async def check(self) -> None:
        await self.writer.check()

    async def close(self) -> None:
        await self.writer.close()


class Sampler:
    """Samples proposals from a model. They are on-policy if it is the model to be trained, otherwise off-policy."""

    def __init__(self, config: Config, part: Part) -> None:
        proposer = part.proposer
        self.proposer, self.seed = proposer, config.run.seed
        self.sampling = proposer.sampling or config.proposals.sampling
        self.round = config.proposals.round or (2 if proposer.adapter else 1)
        self.first_index = part.num_before
        """Samples are numbered across proposers, so that two proposers with one model never share a seed."""
        self.engine_config = proposer.engine or config.engine
        self.source = "on-policy" if model_name(self.engine_config) == model_name(config.engine) else "off-policy"
        self.engine = build_engine(self.engine_config, adapters=[proposer.adapter] if proposer.adapter else [])
        self.format = load_format(self.engine.info, style_of(proposer), config.templates.in_context)
        self.model = proposer.name or proposer.adapter or self.engine.info.model

    async def write(self, row: dict[str, Any], num: int) -> Processed:
        samples = await sample_all(self.engine, self._request(row["prompt_id"], row["messages"], num))
        proposals = [to_row(self._proposal(sample)) for sample in samples]
        return processed({**row, "proposals": proposals}, samples)

    def _proposal(self, sample: Sample) -> Proposal:
        return Proposal(
            text=sample.text.strip(),
            source=self.source,
            model=self.model,
            seed=sample.seed,
            finish_reason=sample.finish_reason,
            num_prompt_tokens=sample.num_prompt_tokens,
            num_tokens=sample.num_tokens,
            reasoning=sample.reasoning or None,
            num_reasoning_tokens=sample.num_reasoning_tokens,
            usage_estimated=sample.usage_estimated,
            error=sample.error,
            round=self.round,
        )

    def _request(self, prompt_id: str, messages: Sequence[Message], num: int) -> GenerateRequest:
        room = self.engine.info.max_model_len - self.sampling.max_tokens
        return GenerateRequest(
            request_id=f"proposals-{prompt_id}",
            prompt_ids=tuple(fit_prompt(self.format, messages, room)),
            messages=tuple(messages),
            sampling=self.sampling.also_stopping_at(self.format.stop_strings),
            seeds=tuple(derive_seed(self.seed, prompt_id, 0, self.first_index + i) for i in range(num)),
            stop_ids=self.format.stop_ids,
            adapter=self.proposer.adapter,
        )

    async def check(self) -> None:
        await self.engine.check()

    async def close(self) -> None:
        await self.engine.close()


class Collector:
    """Takes the answers that came with the prompt. If there are more than its share, a seeded draw chooses them."""

    def __init__(self, config: Config, part: Part) -> None:
        self.seed, self.index = config.run.seed, part.index
        self.name = part.proposer.name

    async def write(self, row: dict[str, Any], num: int) -> Processed:
        responses = row["responses"] or []
        draw = random.Random(derive_seed(self.seed, row["prompt_id"], 0, -2 - self.index))
        kept = sorted(draw.sample(range(len(responses)), min(num, len(responses))))
        proposals = [
            Proposal(
                text=responses[i]["text"].strip(),
                source="off-policy",
                model=self.name or responses[i]["model"] or "unknown",
                seed=None,
                finish_reason=None,
                num_prompt_tokens=0,
                num_tokens=0,
            )
            for i in kept
        ]
        return Processed(rows=[{**row, "proposals": [to_row(proposal) for proposal in proposals]}])

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        return None


def style_of(proposer: ProposerConfig) -> Style:
    """Return the style of a proposer's prompts: an adapter was taught the chat template, a base model was not."""
    return "chat" if proposer.style == "auto" and proposer.adapter is not None else proposer.style


def model_name(engine: EngineConfig) -> str | None:
    """Return the name of an engine's model, or None for a scripted engine."""
    return getattr(engine, "model", None)


def stages(run: Run) -> list[Stage]:
    """Return the proposals stages of a run, one per proposer, in order. The last one writes `proposals/`."""
    config = run.config
    made = []
    source = run.folder.child("prompts")
    for part in parts(config.proposals):
        name = part.stage_name
        engine = part.proposer.engine or config.engine
        made.append(
            Stage(
                name=name,
                source=source,
                output=run.folder.child(name),
                schema=PROPOSALS,
                settings={
                    "proposals": {
                        "too_few": config.proposals.too_few,
                        "round": config.proposals.round,
                        "proposer": part.proposer.model_dump(mode="json", exclude={"placement", "engine", "sampling"})
                        | {"adapter": identity(part.proposer.adapter)},
                        "sampling": to_row(part.proposer.sampling or config.proposals.sampling),
                        "num_proposals": part.num_proposals,
                    },
                    "engine": engine_identity(engine) if part.proposer.source == "on_policy" else None,
                    "selection.num_proposals": config.selection.num_proposals
                    if config.proposals.too_few in {"drop", "fail"}
                    else None,
                    "thinking": "apart",  # proposals are answers without it
                    "seed": config.run.seed,
                    "in_context": InContextPrompt.load(config.templates.in_context).hash,
                },
                worker=partial(ProposalWorker, config, part),
                placement=part.proposer.placement,
                must_yield=True,
                gpus=gpus_of(engine) if part.proposer.source == "on_policy" else 0,
            )
        )
        source = made[-1].output
    return made


def aggregator_hash(templates: TemplatesConfig) -> str:
    """Return the hash of the aggregator template, for fingerprints and data cards."""
    return AggregatorTemplate.load(templates.aggregator).hash
