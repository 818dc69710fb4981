"""targets -> training_set: ids and labels, written once; training reads them and nothing else.

in    + target
out   example_id, prompt_id, variant, split, input_ids, labels, prompt_text, target_text, length_action
on    CPU (a tokenizer)

One row makes one example per variant (`joint` makes two, and a row with several accepted targets one for each). The
ids are the ones serving sends for the same conversation: both come from `templates`. A row whose target should not be
learned from is left out of every variant and counted by reason, so that variants are compared on the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from aft_ray.config import EngineConfig, TemplatesConfig, TrainingSetConfig, Variant
from aft_ray.data.proposals import aggregator_hash
from aft_ray.data.selection import selected_texts
from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.models import resolve_model, tokenizer_hash
from aft_ray.records import TRAINING_SET, derive_seed
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import (
    AggregatorTemplate,
    ChatFormat,
    InContextPrompt,
    build_example,
    check_mask,
    fit_aggregation,
    fit_prompt,
)

Shown = Literal["prompt", "proposals", "empty slots"]

PARTS: dict[Variant, tuple[tuple[str, Shown], ...]] = {
    "sft": (("", "prompt"),),
    "aft": (("", "proposals"),),
    "joint": (("-propose", "prompt"), ("-aggregate", "proposals")),
    "sft_reference": (("", "prompt"),),
    "no_proposals": (("", "empty slots"),),
    "pseudo": (("", "proposals"),),
}
"""What each variant's examples show the model: suffix of the example's id, and what stands before the target."""


def make_examples(
    row: Mapping[str, Any],
    variant: Variant,
    prompt_format: ChatFormat,
    template: AggregatorTemplate,
    config: TrainingSetConfig,
    templates: TemplatesConfig,
    proposals: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The examples of one row for one variant. Raises PromptTooLong, or InputError (no reference, broken mask)."""
    for number, target in enumerate(_target_texts(row, variant), start=1):
        for suffix, shown in PARTS[variant]:
            example = _make_example(row, target, shown, prompt_format, template, config, templates, proposals)
            name = f"{row['prompt_id']}-{variant}{suffix}" + (f"-{number}" if number > 1 else "")
            yield {
                "example_id": name,
                "prompt_id": row["prompt_id"],
                "variant": variant,
                "split": row["split"],
                **example,
            }


def _make_example(
    row: Mapping[str, Any],
    target: str,
    shown: Shown,
    prompt_format: ChatFormat,
    template: AggregatorTemplate,
    config: TrainingSetConfig,
    templates: TemplatesConfig,
    proposals: Sequence[str],
) -> dict[str, Any]:
    messages, action = row["messages"], None
    if shown != "prompt":
        # The target is never cut: what it needs of the window is taken from the prompt's side.
        room = config.max_length - len(prompt_format.target_ids(row["messages"], target))
        slots = proposals if shown == "proposals" else [""] * len(proposals)
        fitted = fit_aggregation(prompt_format, template, messages, slots, room, templates.length_policy)
        messages, action = fitted.messages, fitted.action
    prompt_ids = fit_prompt(prompt_format, messages, config.max_length)
    target_ids = prompt_format.target_ids(messages, target)
    if len(prompt_ids) + len(target_ids) > config.max_length:
        raise PromptTooLong(
            f"prompt {len(prompt_ids)} + target {len(target_ids)} tokens > training_set.max_length {config.max_length}"
        )
    input_ids, labels = build_example(prompt_ids, target_ids)
    check_mask(input_ids, labels, prompt_format)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "prompt_text": prompt_format.decode(prompt_ids),
        "target_text": target,
        "length_action": action,
    }


def _target_texts(row: Mapping[str, Any], variant: Variant) -> list[str]:
    if variant == "sft_reference":
        if not row["reference"]:
            raise InputError("variant sft_reference needs a reference answer, and this prompt has none")
        return [str(row["reference"])]
    if variant == "pseudo":
        return [str(row["pseudo_target"]["text"])]
    return [str(target["text"]) for target in (row["target"], *(row["accepted_targets"] or []))]


def unusable(row: Mapping[str, Any], variants: Sequence[Variant]) -> str | None:
    """Why a row must not be trained on, or None."""
    if row["target_filter"]:
        return str(row["target_filter"])
    pseudo = row["pseudo_target"]
    if "pseudo" in variants and (not pseudo or not pseudo["text"].strip() or pseudo["finish_reason"] == "length"):
        return "empty or truncated pseudo target"
    return None


def shown_proposals(row: Mapping[str, Any], config: TrainingSetConfig, seed: int) -> list[str]:
    """The selected proposals an example shows: all, or the first of them up to a K drawn for this prompt."""
    texts = selected_texts(row)
    if config.vary_num_proposals is None:
        return texts
    smallest, largest = config.vary_num_proposals
    return texts[: random.Random(derive_seed(seed, row["prompt_id"], 0, -3)).randint(smallest, largest)]


def tokenizer_of(engine: EngineConfig) -> str:
    """Folder of the tokenizer of the model to be trained. Raises ConfigError for a scripted engine without one."""
    tokenizer = engine.tokenizer if engine.type == "scripted" else resolve_model(engine.model)
    if tokenizer is None:
        raise ConfigError("training_set needs the tokenizer of the model to be trained; engine.tokenizer is not set")
    return tokenizer


class TrainingSetWorker(RowWorker):
    """Makes the examples of a row."""

    def __init__(self, config: TrainingSetConfig, engine: EngineConfig, templates: TemplatesConfig, seed: int) -> None:
        self.config, self.templates, self.seed = config, templates, seed
        self.format = ChatFormat.load(tokenizer_of(engine), InContextPrompt.load(templates.in_context))
        self.template = AggregatorTemplate.load(templates.aggregator)

    async def process(self, row: dict[str, Any]) -> Processed:
        if reason := unusable(row, self.config.variants):
            return Processed(rows=[], filtered=reason)
        proposals = shown_proposals(row, self.config, self.seed)
        examples = [
            example
            for variant in self.config.variants
            for example in make_examples(
                row, variant, self.format, self.template, self.config, self.templates, proposals
            )
        ]
        num_tokens = sum(len(example["input_ids"]) for example in examples)
        return Processed(rows=examples, prompt_tokens=num_tokens)


def stage(run: Run) -> Stage:
    """The training_set stage of a run."""
    config = run.config
    return Stage(
        name="training_set",
        source=run.folder.child("targets"),
        output=run.folder.child("training_set"),
        schema=TRAINING_SET,
        settings={
            "training_set": config.training_set.model_dump(mode="json", exclude={"placement"}),
            "model": getattr(config.engine, "model", None),
            "tokenizer": tokenizer_hash(tokenizer_of(config.engine)),
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed if config.training_set.vary_num_proposals else None,
        },
        worker=partial(TrainingSetWorker, config.training_set, config.engine, config.templates, config.run.seed),
        placement=config.training_set.placement,
    )
