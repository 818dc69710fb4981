"""An OpenAI-compatible endpoint: what is sent to it and how, and presets for servers that people use.

A preset is nothing but values of the settings of `OpenAIEngineConfig`. Those that a config sets itself win; a mapping
(`rename`, `extra_body`, ...) is joined with the preset's, key by key.

    {type: openai, preset: mistral, model: mistral-large-latest}
    {type: openai, preset: azure, model: gpt, base_url: https://NAME.openai.azure.com/openai/deployments/gpt,
     query: {api-version: "2024-10-21"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from aft_ray.config.strict import EngineSettings, Strict

Preset = Literal["openai", "azure", "mistral", "openrouter", "vllm", "llama_cpp", "ollama", "tgi"]
RequestField = Literal[
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "seed"
]
FIELDS: tuple[str, ...] = get_args(RequestField)
"""The fields of a request besides `messages`, by OpenAI's names for them. top_k and min_p are extensions, which are
sent only where they are on."""
SAMPLED_ELSEWHERE = ("top_k", "min_p")
"""Fields of a request that OpenAI's own API does not know."""

PRESETS: dict[Preset, dict[str, Any]] = {
    "openai": {
        "base_url": "https://api.openai.com/v1",
        "rename": {"max_tokens": "max_completion_tokens"},
        "omit": SAMPLED_ELSEWHERE,
    },
    "azure": {
        "api_key_env": "AZURE_OPENAI_API_KEY",
        "api_key_header": "api-key",
        "rename": {"max_tokens": "max_completion_tokens"},
        "omit": SAMPLED_ELSEWHERE,
    },
    "mistral": {
        "base_url": "https://api.mistral.ai/v1",
        "api_key_env": "MISTRAL_API_KEY",
        "rename": {"seed": "random_seed"},
        "omit": ("stream_options", *SAMPLED_ELSEWHERE),
    },
    "openrouter": {"base_url": "https://openrouter.ai/api/v1", "api_key_env": "OPENROUTER_API_KEY"},
    # These servers sample with values of their own, or of the model's, where a request is silent.
    "vllm": {"api_key_env": None, "extra_body": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}},
    "llama_cpp": {"api_key_env": None, "extra_body": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}},
    # These two ignore the extensions.
    "ollama": {"api_key_env": None, "omit": SAMPLED_ELSEWHERE},
    "tgi": {"api_key_env": None, "omit": SAMPLED_ELSEWHERE},
}


def _texts(value: Any) -> Any:
    """Make texts of the values of headers and parameters: YAML reads `2024-10-21` as a date and `1` as a number."""
    return {key: str(one) for key, one in value.items()} if isinstance(value, Mapping) else value


Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


class PricesConfig(Strict):
    """Prices in US dollars per million tokens."""

    prompt: float = Field(ge=0)
    """Price of the tokens that the endpoint reads."""
    completion: float = Field(ge=0)
    """Price of the tokens that it writes, reasoning included."""


class OpenAIEngineConfig(EngineSettings):
    """Any OpenAI-compatible endpoint: a remote teacher, a judge, another aft_ray."""

    OPERATIONAL = frozenset(
        {
            "preset",
            "base_url",
            "api_key_env",
            "api_key_header",
            "headers",
            "query",
            "stream",
            "rename",
            "tokenizer",
            "calls_tools",
            "max_concurrency",
            "timeout_s",
            "max_retries",
            "max_pause_s",
            "prices",
        }
    )

    type: Literal["openai"] = "openai"
    """An OpenAI-compatible endpoint."""
    preset: Preset | None = None
    """Values that suit a known server, for the settings below that are not set. `openai`, `mistral` and `openrouter`
    know their `base_url`."""
    base_url: str
    """URL in front of `/chat/completions`."""
    model: str
    """Name of the model at the endpoint."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. A config never holds the key itself. None: no key is sent.
    """
    api_key_header: str = "Authorization"
    """Header that carries the key: as `Bearer KEY` in `Authorization`, bare in any other."""
    headers: Texts = Field(default={})
    """Further headers of every request. They are printed and recorded, so they hold no secret."""
    query: Texts = Field(default={})
    """Query parameters of every request, such as `{api-version: "2024-10-21"}`."""
    stream: bool = True
    """Whether to request answers as a stream. Set it to false for a server that cannot stream."""
    omit: tuple[RequestField, ...] = ()
    """Fields that are not sent, because the server refuses or ignores them. The server then uses its own values:
    without `temperature` its own sampling; without `seed`, rows have `seed: null`."""
    rename: dict[RequestField, str] = Field(default={})
    """Fields that are sent under another name, such as `{max_tokens: max_completion_tokens}`."""
    extra_body: dict[str, Any] = Field(default={})
    """Further fields of every request, such as `{reasoning_effort: low}` or
    `{chat_template_kwargs: {enable_thinking: false}}`. A sampling filter that is on (top_k, min_p) wins over its value
    here."""
    calls_tools: bool = False
    """Whether the model may call the tools of a request to our server, which then passes them on in the last layer."""
    tokenizer: str | None = None
    """Tokenizer of the model (hub id or folder), to count tokens where the endpoint reports none. None: four bytes
    count as a token. Either way the rows say `usage_estimated`."""
    max_model_len: int = Field(default=32768, ge=16)
    """Window in tokens, for prompt and answer together. Set it, since an endpoint does not report it."""
    max_concurrency: int = Field(default=32, ge=1)
    """Largest number of concurrent calls. Each 429 halves the limit in force; every round of successes raises it by one
    again."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds until an answer must begin, and again until it must end."""
    max_retries: int = Field(default=5, ge=0)
    """Largest number of retries after 408, 409, 425, 429, 5xx, broken answers and connection errors. Each retry waits
    for the pause that the server asks for, or a jittered backoff. While other calls succeed, a call that the server
    rejects because of load may be retried more often."""
    max_pause_s: float = Field(default=3600, ge=0)
    """Longest pause that the endpoint may ask for (`Retry-After`): all calls wait for its end. A longer one fails the
    row."""
    prices: PricesConfig | None = None
    """Prices of the endpoint, from which `plan` and the manifests compute the cost."""

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        return {name: value for name, value in found.items() if value or name not in {"omit", "extra_body"}}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("preset") not in PRESETS:
            return value
        filled = dict(value)
        for name, preset in PRESETS[value["preset"]].items():
            if isinstance(preset, dict) and isinstance(value.get(name), Mapping):
                filled[name] = {**preset, **value[name]}
            else:
                filled.setdefault(name, preset)
        return filled

    @model_validator(mode="after")
    def _fields_are_ours_to_send(self) -> OpenAIEngineConfig:
        own = {"messages", *FIELDS} - set(SAMPLED_ELSEWHERE)
        for name in self.extra_body:
            if name in own:
                raise ValueError(
                    f"extra_body.{name}: this follows from the settings of sampling and engine; set those, or leave "
                    "the field out with omit"
                )
        for name, new in self.rename.items():
            if new in own - {name}:
                raise ValueError(f"rename.{name}: {new} is the name of another field")
        return self
