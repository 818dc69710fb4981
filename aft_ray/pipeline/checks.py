"""What is checked on this machine before the first token. The conditions between settings are in config/conditions.py.

    check_before_start(config)     packages, templates, model folders, windows; writes nothing
    check_writable(run.dir)        storage.py: the place of the run takes files
    check_endpoints(config, steps) endpoints.py: every endpoint of the steps to come answers one token
    check_tasks(config, prompts)   when the prompts are read: whether they have the references, verifiers and packages
                                   that their answers will need

A condition raises an error that names the key and says what to do. `run`, `plan`, `preview` and every job check all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator

from aft_ray.config import Config, EngineConfig
from aft_ray.config.conditions import named_engines, named_sources
from aft_ray.config.data import VERIFIERS
from aft_ray.errors import ConfigError, PromptTooLong
from aft_ray.hub import is_hub_id
from aft_ray.storage import Folder
from aft_ray.templates.families import FAMILIES

PACKAGES = {
    "vllm": ("vllm", "make setup installs it"),
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes"),
    "deepspeed": ("deepspeed", "make setup installs it"),
    "reasoning_gym": ("reasoning_gym", "pip install aft-ray[tasks]"),
    "ifeval": ("lm_eval", "pip install aft-ray[ifeval]"),
    "ifbench": ("if_verifiable", "pip install aft-ray[ifbench]"),
    "math": ("math_verify", "make setup installs it"),
}
"""Module and remedy of the packages that only some settings need."""


def check_before_start(config: Config) -> None:
    """Refuse a run that this machine can know to fail. Raises ConfigError or PromptTooLong."""
    from aft_ray.miniature.study import study_of_run

    if config.miniature is not None:
        check_before_start(study_of_run(config))
    for condition in CONDITIONS:
        condition(config)


def packages_are_installed(config: Config) -> None:
    """Packages that a setting needs are here."""
    for key, package in _needed_packages(config):
        _check_package(key, package)


def _check_package(key: str, package: str) -> None:
    module, remedy = PACKAGES[package]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{key} needs the package {module}, which is not installed: {remedy}")


def _needed_packages(config: Config) -> Iterator[tuple[str, str]]:
    yield from ((f"{key}.type vllm", "vllm") for key, engine in named_engines(config) if engine.type == "vllm")
    if config.scores.scorer == "reward_model" and config.scores.reward_engine == "vllm":
        yield "scores.reward_engine vllm", "vllm"
    verifiers = [("scores.scorer", config.scores.scorer), ("scores.verifier", config.scores.verifier)]
    if config.scores.scorer == "auto" and config.scores.verifier is None:
        verifiers.append(("prompts.task", config.prompts.task))
        if config.evaluation.prompts is not None:
            verifiers.append(("evaluation.prompts.task", config.evaluation.prompts.task))
    for key, name in verifiers:
        if name in VERIFIERS and name in PACKAGES:
            yield f"{key} {name}", name
    for key, source in named_sources(config):
        if source.startswith("reasoning_gym:"):
            yield f"{key} {source}", "reasoning_gym"
    if config.training.quantization == "nf4":
        yield "training.quantization nf4", "bitsandbytes"
    if config.training.deepspeed != "none":
        yield f"training.deepspeed {config.training.deepspeed}", "deepspeed"


def templates_can_be_read(config: Config) -> None:
    """Templates are complete."""
    from aft_ray.templates import AggregatorTemplate, InContextPrompt

    for templates in (config.templates, config.serving.templates):
        AggregatorTemplate.load(templates.aggregator)
        InContextPrompt.load(templates.in_context)


def models_are_there(config: Config) -> None:
    """A model or adapter that is named as a folder is one, and the hub gives those that are named by its ids."""
    from aft_ray.models import hub_refusal

    for key, engine in named_engines(config):
        if engine.type in {"vllm", "transformers"}:
            _check_model(f"{key}.model", engine.model)
    if config.scores.scorer == "reward_model" and config.scores.reward_model is not None:
        _check_model("scores.reward_model", config.scores.reward_model)
    for key, adapter in named_adapters(config):
        if is_hub_id(adapter):
            if (refusal := hub_refusal(adapter, "adapter_config.json")) is not None:
                raise ConfigError(f"{key} {adapter}: no such folder here, and {refusal}")
        elif not Folder.at(adapter).exists("adapter_config.json"):
            raise ConfigError(f"{key} {adapter}: no adapter there; expected a folder with adapter_config.json")


def named_adapters(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every adapter that a config names, by folder, URL or hub id, with its key."""
    proposals, serving = config.proposals, config.serving
    own: list[tuple[str, str | None]] = [
        ("proposals.adapter", proposals.adapter),
        *((f"proposals.proposers.{number}.adapter", one.adapter) for number, one in enumerate(proposals.proposers)),
        ("scores.likelihood.adapter", config.scores.likelihood.adapter),
        ("targets.adapter", config.targets.adapter),
        *((f"serving.adapters.{name}", folder) for name, folder in (serving.adapters or {}).items()),
    ]
    yield from ((key, folder) for key, folder in own if folder is not None)


def _check_model(key: str, reference: str) -> None:
    from aft_ray.models import PACKAGED, hub_refusal, resolve_model

    if reference in PACKAGED:
        return  # it is converted by the first worker that loads it
    if "://" in reference:
        if not Folder.at(reference).exists("config.json"):
            raise ConfigError(f"{key} {reference}: no config.json there; expected a Hugging Face model folder")
        return
    if not is_hub_id(reference):
        resolve_model(reference)
    elif (refusal := hub_refusal(reference)) is not None:
        raise ConfigError(f"{key} {reference}: {refusal}")


def chat_templates_are_there(config: Config) -> None:
    """What is trained, served, judged or written as a target has a chat template. Proposals need none."""
    from aft_ray.models import has_chat_template

    for key, engine in engines_that_chat(config):
        if engine.type not in {"vllm", "transformers"} or engine.chat_template is not None:
            continue
        if has_chat_template(engine.model) is False:
            raise ConfigError(
                f"{key}.model {engine.model} comes without a chat template: set {key}.chat_template "
                f"({', '.join(FAMILIES)}, or the path of a Jinja file), or use an instruct model. The in-context "
                "prompt samples proposals only, and is never what is trained or served"
            )


def engines_that_chat(config: Config) -> Iterator[tuple[str, EngineConfig]]:
    """Yield every engine whose prompts must have a chat template, with the key that names it."""
    sampling_only = {"proposals.engine", "scores.likelihood.engine"}
    for key, engine in named_engines(config):
        if key not in sampling_only and not key.startswith("proposals.proposers."):
            yield key, engine


def training_can_start(config: Config) -> None:
    """Training has its trackers, the adapter that it starts from, and a model that it can pack."""
    from aft_ray.training import check_before_training

    if config.engine.type in {"vllm", "transformers"}:
        check_before_training(config.training, config.engine.model, config.training_set.max_length)


def answers_fit_the_window(config: Config) -> None:
    """Sampling and aggregator prompt fit the window.

    No tokenizer is loaded: a word is at least one token, so a prompt that does not fit by words cannot fit by tokens.
    """
    from aft_ray.templates import AggregatorTemplate

    template = AggregatorTemplate.load(config.templates.aggregator)
    num_words = len(template.system.split())
    plan = config.evaluation.plan
    windows = [
        ("proposals.sampling", config.proposals.engine or config.engine, config.proposals.sampling, 1),
        ("evaluation.plan.proposal", config.serving.engine or config.engine, plan.proposal, 1),
    ]
    if not config.makes_targets:
        windows.pop(0)
    elif config.targets.source == "teacher":
        windows.append(("targets.sampling", config.targets.engine or config.engine, config.targets.sampling, num_words))
    if plan.num_layers:
        windows.append(("evaluation.plan.final", config.serving.engine or config.engine, plan.final, num_words))
    for key, engine, sampling, num_prompt in windows:
        window = engine.max_model_len
        if window is not None and sampling.max_tokens + num_prompt > window:
            raise PromptTooLong(
                f"{key}.max_tokens {sampling.max_tokens} + a prompt of at least {num_prompt} tokens > "
                f"max_model_len {window}: lower max_tokens, raise max_model_len, or shorten the template"
            )


def own_verifier_is_there(config: Config) -> None:
    """A verifier of the user's own can be imported, and takes a row and a text."""
    from aft_ray.data.verifiers.own import OwnVerifier

    if config.scores.verifier is not None and config.scores.verifier not in VERIFIERS:
        OwnVerifier.load(config.scores.verifier)


def check_tasks(config: Config, prompts: Folder) -> None:
    """Refuse what the prompts rule out, before the first token; say what the report will not tell.

    A verifier of the user's own is tried on the first prompt. Raises ConfigError where it fails, where more rows than
    may fail lack the verifier or the reference that their target needs, or where a verifier's package is missing.
    """
    tasks, no_reference = _tasks_of(prompts)
    num_rows = tasks.total()
    if num_rows and no_reference > config.run.max_failure_rate * num_rows:
        _refuse_without_references(config, f"{no_reference} of {num_rows}")
    if num_rows and config.scores.verifier is None:
        _check_verifiers(config, tasks)
    elif num_rows:
        _try_own_verifier(config.scores.verifier, prompts)


def _refuse_without_references(config: Config, lacking: str) -> None:
    needs = {
        "targets.source reference": config.targets.source == "reference",
        "training_set.source prompts": not config.makes_targets,
        "training_set.variants sft_reference": "sft_reference" in config.training_set.variants,
    }
    for key in (key for key, is_set in needs.items() if is_set):
        raise ConfigError(
            f"{key} needs the reference answers of the prompts, and {lacking} have none. Set prompts.reference_column, "
            "or leave it out"
        )


def _check_verifiers(config: Config, tasks: Counter[str]) -> None:
    """Check the verifiers of the tasks, of which there are so many rows each."""
    num_rows, num_verified = tasks.total(), sum(tasks[task] for task in VERIFIERS)
    for task in sorted(tasks.keys() & VERIFIERS & PACKAGES.keys()):
        _check_package(f"task {task} of the prompts", task)
    found = ", ".join(f"{count} {task or 'no task'}" for task, count in tasks.most_common())
    is_choosy = config.targets.source == "teacher" and config.targets.keep != "best"
    if is_choosy and num_rows - num_verified > config.run.max_failure_rate * num_rows:
        raise ConfigError(
            f"targets.keep {config.targets.keep} keeps what a verifier accepts, and {num_rows - num_verified} of "
            f"{num_rows} prompts have none (tasks: {found}). Set targets.keep to best, or prompts.task to one of "
            f"{', '.join(sorted(VERIFIERS))}"
        )
    if config.scores.scorer == "auto" and not num_verified:
        unscored = "proposals get no scores, and the" if config.makes_targets else "the"
        print(
            f"no prompt has a verifier (tasks: {found}): {unscored} report cannot tell which answers are better. To "
            "change that, set scores.scorer or prompts.task",
            file=sys.stderr,
        )


def _try_own_verifier(verifier: str | None, prompts: Folder) -> None:
    from aft_ray.data.verifiers.own import OwnVerifier

    if verifier is not None and verifier not in VERIFIERS:
        [first] = prompts.read_table(prompts.names(".parquet")[0]).slice(0, 1).to_pylist()
        OwnVerifier.load(verifier).check(first)


def _tasks_of(prompts: Folder) -> tuple[Counter[str], int]:
    """Return the number of prompts by task (empty: none), and the number of those without a reference answer."""
    tasks: Counter[str] = Counter()
    no_reference = 0
    for name in prompts.names(".parquet"):
        table = prompts.read_table(name, ["task", "reference"]).to_pydict()
        tasks.update(task or "" for task in table["task"])
        no_reference += sum(not reference for reference in table["reference"])
    return tasks, no_reference


CONDITIONS: tuple[Callable[[Config], None], ...] = (
    packages_are_installed,
    own_verifier_is_there,
    templates_can_be_read,
    models_are_there,
    chat_templates_are_there,
    training_can_start,
    answers_fit_the_window,
)
