"""The conditions between the sections of a config, in one table. A config that breaks one is refused when it is read.

    CONDITIONS = (
        enough_proposals,     # selection.num_proposals <= proposals.num_per_prompt
        ...
    )

Each condition is a function that yields one sentence per problem: the keys, the values found, why they clash and what
to set. They need nothing but the config, so `run`, `plan`, `submit`, `serve` and every job apply them all. What also
needs this machine (installed packages, model folders, storage) is checked in `pipeline/checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from aft_ray.config.data import VERIFIERS
from aft_ray.config.engines import LARGEST_LORA_RANK, EngineConfig, VllmEngineConfig, why_not_on_gpus
from aft_ray.errors import nearest

if TYPE_CHECKING:
    from aft_ray.config.run import Config
    from aft_ray.inference.plan import Plan

Condition = Callable[["Config"], Iterator[str]]


def enough_proposals(config: Config) -> Iterator[str]:
    """A selection is drawn from the proposals."""
    if config.selection.num_proposals > config.proposals.num_per_prompt:
        yield (
            f"selection.num_proposals {config.selection.num_proposals} > proposals.num_per_prompt "
            f"{config.proposals.num_per_prompt}: a selection cannot keep more than there are. Raise num_per_prompt"
        )


def varied_within_selection(config: Config) -> Iterator[str]:
    """A varied K is drawn from the selection."""
    varied = config.training_set.vary_num_proposals
    if varied and not 1 <= varied[0] <= varied[1] <= config.selection.num_proposals:
        yield (
            f"training_set.vary_num_proposals {list(varied)}: expected 1 <= smallest <= largest <= "
            f"selection.num_proposals {config.selection.num_proposals}"
        )


def pseudo_targets_exist(config: Config) -> Iterator[str]:
    """Variant `pseudo` is trained on targets that the teacher writes only when asked to."""
    if "pseudo" in config.training_set.variants and not config.targets.pseudo:
        yield "training_set.variants includes 'pseudo': set targets.pseudo to true, or leave the variant out"


def answers_that_came_with_the_prompts(config: Config) -> Iterator[str]:
    """Without the stages that make targets, there is one kind of example."""
    own = config.training_set
    if own.source == "prompts" and own.variants != ("sft_reference",):
        yield (
            f"training_set.variants {list(own.variants)}: with training_set.source prompts there are no proposals and "
            "no targets. Set variants to [sft_reference], or source to targets"
        )
    if own.source == "targets" and own.answers == "all":
        yield (
            "training_set.answers all: only the last answer is a target here. Set training_set.source to prompts, or "
            "answers to last"
        )


def answers_for_off_policy(config: Config) -> Iterator[str]:
    """Off-policy proposals are the answers that came with the prompts."""
    if config.prompts.responses is None and any(p.source == "off_policy" for p in config.proposals.proposers):
        yield ("proposals.proposers includes an off_policy one: set prompts.responses to the source of its answers")


def comparable_scores(config: Config) -> Iterator[str]:
    """A filter compares the score of a target with those of its proposals."""
    if config.targets.filters.worse_than_best and config.scores.scorer in {
        "judge",
        "likelihood",
        "agreement",
        "source",
        "none",
    }:
        yield (
            f"targets.filters.worse_than_best: scores of the {config.scores.scorer} cannot be compared between a "
            "target and the proposals it was written from. Use a verifier or a reward model, or set it to null"
        )


def easy_means_verified(config: Config) -> Iterator[str]:
    """Easy and hard prompts are told apart by how many proposals are right, which only a verifier knows."""
    if config.selection.easy_per_hard is not None and config.scores.scorer not in VERIFIERS | {"auto"}:
        yield (
            f"selection.easy_per_hard counts right proposals, and a score of {config.scores.scorer} does not say "
            f"which are right: set scores.scorer to a verifier ({', '.join(sorted(VERIFIERS))}, auto), or leave "
            "easy_per_hard out"
        )


def accepted_means_verified(config: Config) -> Iterator[str]:
    """Policies that keep accepted candidates need something that accepts them."""
    task = config.prompts.task
    if config.scores.verifier is not None or config.targets.keep == "best" or task is None or task in VERIFIERS:
        return
    hint = nearest(task, sorted(VERIFIERS), kind="verifiers")
    yield (
        f"targets.keep {config.targets.keep} keeps what a verifier accepts, and prompts.task {task} has none ({hint}): "
        "set targets.keep to best, or scores.verifier"
    )


def likelihood_is_local(config: Config) -> Iterator[str]:
    """A likelihood is the log-probability of a given text, which endpoints do not return."""
    engine = config.scores.likelihood.engine
    if config.scores.scorer == "likelihood" and engine is not None and engine.type == "openai":
        yield (
            "scores.likelihood.engine.type openai: an endpoint returns no log-probabilities of a given "
            "text. Set it to a vllm or transformers engine"
        )


def packs_hold_examples(config: Config) -> Iterator[str]:
    """An example is never cut."""
    pack_length = config.training.pack_length
    if pack_length is not None and pack_length < config.training_set.max_length:
        yield (
            f"training.pack_length {pack_length} < training_set.max_length {config.training_set.max_length}: "
            "an example that is longer than a row would be cut. Raise pack_length"
        )


def held_out_decides(config: Config) -> Iterator[str]:
    """Held-out losses can decide where a training ends only where prompts are held out."""
    if config.training.watches_held_out and not config.prompts.held_out:
        yield (
            "training.load_best_model_at_end and early_stopping_patience compare the losses of held-out examples, and "
            "prompts.held_out is 0: raise it, or leave them out"
        )


def early_stopping_can_fire(config: Config) -> Iterator[str]:
    """A training that ends before it can run out of patience never stops early.

    Without `max_steps`, `prompts.limit` bounds the number of examples, and so of steps, from above.
    """
    training, limit = config.training, config.prompts.limit
    if training.max_steps is not None:
        num_steps, because = training.max_steps, "training.max_steps"
    elif limit is not None and config.training_set.source == "targets":
        kept = config.targets.num_candidates if config.targets.keep == "all" else 1
        per_prompt = kept * (2 if "joint" in config.training_set.variants else 1)
        num_steps, because = training.planned_steps(limit * per_prompt), f"at the latest, with prompts.limit {limit}"
    else:
        return
    never = training.why_never_stopped_early(num_steps)
    if never is not None:
        yield f"{never} ({because}). Lower one of the two, train for more steps, or leave early_stopping_patience out"


def trained_within_window(config: Config) -> Iterator[str]:
    """A model is trained on what it can be served with."""
    window = getattr(config.engine, "max_model_len", None)
    if window is not None and config.training_set.max_length > window:
        yield (
            f"training_set.max_length {config.training_set.max_length} > engine.max_model_len {window}: the model "
            "would be trained on prompts it is never served with"
        )


def trained_model_is_local(config: Config) -> Iterator[str]:
    """The run's own engine holds the model that is trained."""
    if config.engine.type == "openai":
        yield (
            "engine.type openai cannot be trained: set engine to a vllm or transformers engine, and targets.engine to "
            "the remote teacher"
        )


def trained_on_gpus_too(config: Config) -> Iterator[str]:
    """A model that needs GPUs to be sampled needs them to be trained."""
    sampled_on = max((p.placement.num_gpus or 0 for p in config.proposals.all_proposers), default=0)
    if sampled_on and config.training.gpus_per_worker == 0:
        yield (
            f"training.gpus_per_worker 0, but the proposals are sampled on {sampled_on:g} GPU(s) per worker: the model "
            "would be trained on CPUs. Set training.gpus_per_worker to 1"
        )


def engines_have_their_gpus(config: Config) -> Iterator[str]:
    """Each worker or replica holds one engine."""
    for key, engine, num_gpus in placed_engines(config):
        reason = why_not_on_gpus(engine, num_gpus)
        if reason is not None:
            yield f"{key}.num_gpus {num_gpus:g}, {reason}"


def engines_take_the_adapters(config: Config) -> Iterator[str]:
    """What is trained is served, evaluated, and perhaps sampled from."""
    for key, engine in _engines_of_trained_adapters(config):
        rank = config.training.lora.rank
        if config.training.lora.dora:
            yield (
                f"training.lora.dora is true, and {key} is vLLM, which cannot load DoRA adapters: set dora to false, "
                "or serving.engine to a transformers engine"
            )
        if config.training.lora.modules_to_save:
            yield (
                f"training.lora.modules_to_save is set, and {key} is vLLM, which cannot load such an adapter: set "
                "serving.engine to a transformers engine, or serving.adapters to {} and let vLLM serve the merged "
                "model (aft-ray export --merged)"
            )
        if rank > LARGEST_LORA_RANK:
            yield (
                f"training.lora.rank {rank}, and {key} is vLLM, which loads ranks up to {LARGEST_LORA_RANK}: lower it, "
                "or set serving.engine to a transformers engine"
            )
        elif engine.max_lora_rank is not None and rank > engine.max_lora_rank:
            yield (
                f"training.lora.rank {rank} > {key}.max_lora_rank {engine.max_lora_rank}: the engine could not load "
                f"the trained adapter. Leave {key}.max_lora_rank out, or raise it"
            )
        if "embed_tokens" in config.training.lora.target_modules:
            yield (
                f"training.lora.target_modules with embed_tokens, and {key} is vLLM, which cannot load an adapter on "
                "embeddings: leave it out, or set serving.engine to a transformers engine"
            )
    for key, sampler, adapter in _engines_with_adapters(config):
        if sampler.type == "openai":
            yield f"{key}.adapter {adapter}: a remote endpoint takes no adapter; name it in engine.model"
        if sampler.type == "vllm" and sampler.max_lora_rank == 0:
            yield f"{key}.adapter {adapter}, but max_lora_rank 0 of its engine switches adapters off. Raise it"


def evaluated_models_exist(config: Config) -> Iterator[str]:
    """An evaluation without `base_url` asks the run's own endpoint."""
    if config.evaluation.base_url is not None:
        return
    known = served_names(config)
    for system in config.evaluation.systems or ():
        name = system.model.partition("@")[0]
        if name not in known:
            yield (
                f"evaluation.systems: '{system.name}' asks model '{system.model}', and the run serves "
                f"{', '.join(known)}"
            )


def served_models_exist(config: Config) -> Iterator[str]:
    """Names in the serving section are names of served models."""
    serving, known = config.serving, served_names(config)
    if serving.default_model not in (None, *known):
        yield f"serving.default_model '{serving.default_model}' is not one of the models {', '.join(known)}"
    if serving.proposer_adapter not in (None, *known[1:]):
        yield (
            f"serving.proposer_adapter '{serving.proposer_adapter}' is not one of the adapters "
            f"{', '.join(known[1:]) or '(there are none)'}"
        )


def plans_within_limits(config: Config) -> Iterator[str]:
    """The endpoint refuses requests beyond its limits."""
    plans = [("serving.plan", config.serving.plan)]
    if config.evaluation.base_url is None:
        plans.append(("evaluation.plan", config.evaluation.plan))
        systems = config.evaluation.systems or ()
        plans += [(f"evaluation.systems.{system.name}.plan", system.plan) for system in systems if system.plan]
    for key, plan in plans:
        for name, found, limit in _limits(plan, config):
            if found > limit:
                yield (
                    f"{key}: {name} {found} > serving.max_{name} {limit}: the endpoint would refuse every request. "
                    f"Raise serving.max_{name}"
                )


CONDITIONS: tuple[Condition, ...] = (
    enough_proposals,
    varied_within_selection,
    pseudo_targets_exist,
    answers_that_came_with_the_prompts,
    answers_for_off_policy,
    comparable_scores,
    easy_means_verified,
    accepted_means_verified,
    likelihood_is_local,
    packs_hold_examples,
    held_out_decides,
    early_stopping_can_fire,
    trained_within_window,
    trained_model_is_local,
    trained_on_gpus_too,
    engines_have_their_gpus,
    engines_take_the_adapters,
    evaluated_models_exist,
    served_models_exist,
    plans_within_limits,
)


def problems(config: Config) -> list[str]:
    """Return one sentence for every problem of a config whose sections are each valid."""
    return [sentence for condition in CONDITIONS for sentence in condition(config)]


# ── what the conditions look at ───────────────────────────────────────────────────────────────────────────────────────


def placed_engines(config: Config) -> Iterator[tuple[str, EngineConfig, float | None]]:
    """Yield every engine that a worker or replica starts, with the key of its resources and its number of GPUs."""
    for number, proposer in enumerate(config.proposals.all_proposers):
        if proposer.source == "on_policy":
            several = f"proposals.proposers.{number}.placement" if config.proposals.proposers else "proposals.placement"
            yield several, proposer.engine or config.engine, proposer.placement.num_gpus
    if config.targets.source == "teacher":
        yield "targets.placement", config.targets.engine or config.engine, config.targets.placement.num_gpus
    if config.scores.scorer == "judge" and config.scores.judge is not None:
        yield "scores.placement", config.scores.judge.engine, config.scores.placement.num_gpus
    if config.scores.scorer == "likelihood":
        yield "scores.placement", config.scores.likelihood.engine or config.engine, config.scores.placement.num_gpus
    for key, of_pool, replicas in config.serving.pools:
        yield f"serving.{key}", of_pool or config.engine, replicas.num_gpus


def named_engines(config: Config) -> Iterator[tuple[str, EngineConfig]]:
    """Yield every engine of a config with the key that names it."""
    yield "engine", config.engine
    proposals, scores, serving = config.proposals, config.scores, config.serving
    own: list[tuple[str, EngineConfig | None]] = [
        ("proposals.engine", proposals.engine),
        *((f"proposals.proposers.{number}.engine", one.engine) for number, one in enumerate(proposals.proposers)),
        ("scores.judge.engine", scores.judge.engine if scores.judge else None),
        ("scores.likelihood.engine", scores.likelihood.engine),
        ("targets.engine", config.targets.engine),
        ("serving.engine", serving.engine),
        ("serving.proposer_engine", serving.proposer_engine),
        *((f"serving.proposers.{pool.name}.engine", pool.engine) for pool in serving.proposers),
    ]
    yield from ((key, engine) for key, engine in own if engine is not None)


def named_sources(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every source of prompts that a config names, with its key."""
    yield "prompts.source", config.prompts.source
    yield from (("prompts.decontaminate", source) for source in config.prompts.decontaminate)
    if config.evaluation.prompts is not None:
        yield "evaluation.prompts.source", config.evaluation.prompts.source


def served_names(config: Config) -> list[str]:
    """Return the names of the models that the run's endpoint serves: the base model, then what is trained."""
    adapters = config.serving.adapters
    trained = list(config.training_set.variants) if adapters is None else list(adapters)
    if config.training.method == "full":
        trained += [variant for variant in config.training_set.variants if variant not in trained]
    return [config.serving.base_name, *trained]


def _engines_of_trained_adapters(config: Config) -> Iterator[tuple[str, VllmEngineConfig]]:
    """Yield the vLLM engines that must load the adapters which this run trains."""
    if config.training.method == "lora" and config.serving.adapters is None and config.evaluation.base_url is None:
        key, engine = ("serving.engine", config.serving.engine) if config.serving.engine else ("engine", config.engine)
        if engine.type == "vllm":
            yield key, engine


def _engines_with_adapters(config: Config) -> Iterator[tuple[str, EngineConfig, str]]:
    """Yield the engines that load an adapter which is there already."""
    for number, proposer in enumerate(config.proposals.all_proposers):
        if proposer.adapter is not None:
            key = f"proposals.proposers.{number}" if config.proposals.proposers else "proposals"
            yield key, proposer.engine or config.engine, proposer.adapter
    if config.targets.adapter is not None:
        yield "targets", config.targets.engine or config.engine, config.targets.adapter
    likelihood = config.scores.likelihood
    if config.scores.scorer == "likelihood" and likelihood.adapter is not None:
        yield "scores.likelihood", likelihood.engine or config.engine, likelihood.adapter


def _limits(plan: Plan, config: Config) -> list[tuple[str, int, int]]:
    sampling = (plan.proposal, *plan.aggregation, plan.final)
    return [
        ("num_layers", plan.num_layers, config.serving.max_num_layers),
        ("num_proposals", plan.num_proposals if plan.num_layers else 1, config.serving.max_num_proposals),
        ("tokens", max(one.max_tokens for one in sampling), config.serving.max_tokens),
    ]
