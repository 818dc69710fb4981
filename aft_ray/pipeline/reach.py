"""Whether what a config names elsewhere can be reached from here, with the keys and tokens at hand.

Models and data sets of the Hugging Face hub are looked up, not fetched; remote endpoints are asked for their models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from aft_ray.config import Config, OpenAIEngineConfig
from aft_ray.config.conditions import named_engines, named_sources
from aft_ray.data.prompts.sources import HubDataset
from aft_ray.engines.openai import key_header
from aft_ray.hub import is_hub_id, split
from aft_ray.models import PACKAGED
from aft_ray.pipeline.checks import named_adapters
from aft_ray.pipeline.findings import Finding, ok, problem

TIMEOUT_S = 20.0


def reach_all(config: Config) -> list[Finding]:
    """Look up everything that the config names elsewhere."""
    found = [reach_hub(key, reference, "model") for key, reference in hub_models(config)]
    found += [reach_hub(key, reference, "dataset") for key, reference in hub_datasets(config)]
    found += [reach_endpoint(key, engine) for key, engine in named_engines(config) if engine.type == "openai"]
    return found


def hub_models(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the models and adapters of the hub that the config names, each once, with the first key that names it."""
    engines = named_engines(config)
    named = [(f"{key}.model", one.model) for key, one in engines if one.type == "vllm" or one.type == "transformers"]
    if config.scores.scorer == "reward_model" and config.scores.reward_model is not None:
        named.append(("scores.reward_model", config.scores.reward_model))
    named += [(key, adapter) for key, adapter in named_adapters(config) if is_hub_id(adapter)]
    seen = set()
    for key, reference in named:
        is_place = "://" in reference or reference.startswith((".", "/", "~")) or os.path.isdir(reference)
        if reference not in PACKAGED and not is_place and reference not in seen:
            seen.add(reference)
            yield key, reference


def hub_datasets(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the data sets of the hub that the config names."""
    for key, source in named_sources(config):
        if source.startswith("hub:"):
            yield key, HubDataset.of(source.removeprefix("hub:")).path


def reach_hub(key: str, reference: str, kind: str) -> Finding:
    """Look up a model or a data set of the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    name = f"{key} {reference}"
    token = "with HF_TOKEN" if os.environ.get("HF_TOKEN") else "without a token (HF_TOKEN is not set)"
    try:
        api.auth_check(split(reference)[0], repo_type=kind)
    except GatedRepoError:
        return problem(
            f"{name}: access is not granted {token}",
            f"Accept its terms at https://huggingface.co/{split(reference)[0]}, and set HF_TOKEN (run.environment)",
        )
    except RepositoryNotFoundError:
        return problem(f"{name}: not found on the hub {token}", "Check the name; a private one needs HF_TOKEN")
    except OfflineModeIsEnabled:
        return problem(f"{name}: HF_HUB_OFFLINE is set, so only copies in the cache of each node work", "Unset it")
    except (HfHubHTTPError, OSError) as error:
        reason = type(error).__name__
        return problem(f"{name}: the hub cannot be reached ({reason})", "Check the network, or name a folder or URL")
    return ok(f"{name}: found on the hub")


def reach_endpoint(key: str, engine: OpenAIEngineConfig) -> Finding:
    """Ask a remote endpoint for its models."""
    import requests

    name = f"{key} {engine.base_url}"
    if engine.api_key_env is not None and not os.environ.get(engine.api_key_env):
        return problem(
            f"{name}: the environment variable {engine.api_key_env} holds no key",
            "Set it on every node, or name a file in run.environment_file",
        )
    try:
        url = f"{engine.base_url.rstrip('/')}/models"
        headers = {**engine.headers, **key_header(engine)}
        answer = requests.get(url, headers=headers, params=engine.query, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return problem(f"{name}: does not answer ({type(error).__name__})", "Check base_url and the network")
    if answer.status_code in (401, 403):
        return problem(f"{name}: does not accept the key in {engine.api_key_env}", "Set the key of this endpoint")
    if answer.ok and f'"{engine.model}"' not in answer.text:
        return problem(f"{name}: serves no model {engine.model}", f"Ask {url} for those that it serves")
    return ok(f"{name}: answers")
