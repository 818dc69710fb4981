"""targets -> training_set: ids and labels, written once; training reads them and nothing else.

in    + target
out   example_id, prompt_id, variant, split, input_ids, labels, prompt_text, target_text, length_action
on    CPU (a tokenizer)

One row makes one example per variant. The ids are the ones serving sends for the same conversation: both come from
`templates`. A truncated or empty target is filtered and counted, never trained on as if it were finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from aft_ray.config import EngineConfig, TemplatesConfig, TrainingSetConfig, Variant
from aft_ray.data.proposals import aggregator_hash
from aft_ray.data.selection import selected_texts
from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.models import resolve_model
from aft_ray.records import TRAINING_SET
from aft_ray.runs import Run
from aft_ray.stages import Processed, RowWorker, Stage
from aft_ray.templates import (
    AggregatorTemplate,
    ChatFormat,
    InContextPrompt,
    build_example,
    check_mask,
    fit_aggregation,
    fit_prompt,
)


def make_example(
    row: Mapping[str, Any],
    variant: Variant,
    prompt_format: ChatFormat,
    template: AggregatorTemplate,
    config: TrainingSetConfig,
    templates: TemplatesConfig,
) -> dict[str, Any]:
    """One row of the training set. Raises PromptTooLong, or InputError (no reference, broken mask)."""
    target = _target_text(row, variant)
    messages, action = row["messages"], None
    if variant in {"aft", "no_proposals"}:
        proposals = selected_texts(row) if variant == "aft" else []
        # The target is never cut: what it needs of the window is taken from the prompt's side.
        room = config.max_length - len(prompt_format.target_ids(row["messages"], target))
        fitted = fit_aggregation(prompt_format, template, messages, proposals, room, templates.length_policy)
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
        "example_id": f"{row['prompt_id']}-{variant}",
        "prompt_id": row["prompt_id"],
        "variant": variant,
        "split": row["split"],
        "input_ids": input_ids,
        "labels": labels,
        "prompt_text": prompt_format.decode(prompt_ids),
        "target_text": target,
        "length_action": action,
    }


def _target_text(row: Mapping[str, Any], variant: Variant) -> str:
    if variant == "sft_reference":
        if not row["reference"]:
            raise InputError("variant sft_reference needs a reference answer, and this prompt has none")
        return str(row["reference"])
    return str(row["target"]["text"])


def unusable(row: Mapping[str, Any]) -> str | None:
    """Why a row's target must not be trained on, or None."""
    target = row["target"]
    if not target["text"].strip():
        return "empty target"
    return "truncated target" if target["finish_reason"] == "length" else None


class TrainingSetWorker(RowWorker):
    """Makes the examples of a row."""

    def __init__(self, config: TrainingSetConfig, engine: EngineConfig, templates: TemplatesConfig) -> None:
        tokenizer = engine.tokenizer if engine.type == "scripted" else resolve_model(engine.model)
        if tokenizer is None:
            raise ConfigError(
                "training_set needs the tokenizer of the model to be trained; engine.tokenizer is not set"
            )
        self.config, self.templates = config, templates
        self.format = ChatFormat.load(tokenizer, InContextPrompt.load(templates.in_context))
        self.template = AggregatorTemplate.load(templates.aggregator)

    async def process(self, row: dict[str, Any]) -> Processed:
        if reason := unusable(row):
            return Processed(rows=[], filtered=reason)
        examples = [
            make_example(row, variant, self.format, self.template, self.config, self.templates)
            for variant in self.config.variants
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
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
        },
        worker=partial(TrainingSetWorker, config.training_set, config.engine, config.templates),
        placement=config.training_set.placement,
    )
