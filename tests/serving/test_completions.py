"""Text completions as harnesses send them: lists, ids, echo with log-probabilities; and ids of texts."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from aft_ray.config import AdmissionConfig, ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference import Role
from aft_ray.serving.aggregator import Aggregator
from aft_ray.serving.service import Service
from aft_ray.templates import AggregatorTemplate, ChatFormat
from tests.serving.local_server import serving
from tests.serving.test_final_layer import events_of, refused
from tests.serving.test_ingress import over_http, service_over
from tests.templates.families import format_of, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("llama3").save_pretrained(folder)
    return folder


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(ScriptedEngineConfig(tokenizer=str(tokenizer_folder), num_tokens=2))


def service_of(engine: ScriptedEngine, chat: ChatFormat | None = None, **settings: Any) -> Service:
    """Return a service whose engine takes ids."""
    role = Role(engine=engine, format=chat or format_of("llama3"))
    answers = Aggregator(proposers=(role,), aggregator=role, template=AggregatorTemplate.load("aft"))
    service = service_over(engine, **settings)
    object.__setattr__(service, "answers", answers)
    return service


def complete(service: Service, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return over_http(service, lambda client: client.post(path, json=body))


def test_a_list_of_prompts_is_answered_in_its_order(engine: ScriptedEngine) -> None:
    alone = [complete(service_of(engine), prompt=text, seed=1, n=2).json() for text in ("Hello", "Good day")]
    both = complete(service_of(engine), prompt=["Hello", "Good day"], seed=1, n=2).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for reply in alone for choice in reply["choices"]]
    assert [choice["text"] for choice in both["choices"]] == texts
    assert both["usage"]["total_tokens"] == sum(reply["usage"]["total_tokens"] for reply in alone)


def test_a_streamed_list_has_the_choices_and_the_usage_of_the_plain_one(engine: ScriptedEngine) -> None:
    body: dict[str, Any] = {"prompt": ["Hello", "Good day", "Hello"], "seed": 1, "n": 2, "aft": {"progress": True}}
    plain = complete(service_of(engine), **body | {"aft": {}}).json()
    reply = complete(service_of(engine), **body, stream=True, stream_options={"include_usage": True})
    chunks = events_of(reply)
    assert len({chunk["id"] for chunk in chunks}) == 1
    texts: Counter[int] = Counter()
    written, ends = {index: "" for index in range(6)}, dict[int, str]()
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        written[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
        texts[choice["index"]] += bool(choice["text"])
    assert list(written.values()) == [choice["text"] for choice in plain["choices"]]
    assert list(ends.values()) == [choice["finish_reason"] for choice in plain["choices"]]
    assert min(texts.values()) > 1  # every answer comes in pieces
    [usage] = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert [drop_seconds(layer) for layer in usage["aft"]["layers"]] == [
        drop_seconds(layer) for layer in plain["usage"]["aft"]["layers"]
    ]
    progress = [json.loads(line[6:])["aft"]["progress"] for line in reply.text.split("\n") if '"progress"' in line]
    assert max(report["num_done"] for report in progress) == progress[0]["num_proposals"] == 6
    assert reply.text.count("data: [DONE]") == 1


def drop_seconds(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if name != "seconds"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_of_a_list_counts_and_where_one_has_no_room_none_runs(
    engine: ScriptedEngine, tmp_path: Path, stream: bool
) -> None:
    service = service_of(engine, admission=AdmissionConfig(max_requests=2), ledger=str(tmp_path))
    ask = partial(complete, service, stream=stream, prompt=["Hello", "Good day"])
    assert ask(prompt=["a", "b", "c"]).status_code == 429
    assert not engine.requests
    assert ask().status_code == 200  # nothing was left of the refused ones
    lines = [json.loads(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert [line["status"] for line in lines if line["prompt_tokens"]] == ["answered"] * 2
    assert sorted(line["id"].count("-") for line in lines if line["prompt_tokens"]) == [1, 2]


def test_a_client_that_leaves_the_stream_of_a_list_ends_all_its_runs(tokenizer_folder: Path, tmp_path: Path) -> None:
    slow = ScriptedEngineConfig(tokenizer=str(tokenizer_folder), seconds_per_token=0.05, num_tokens=200)
    service = service_of(ScriptedEngine(slow), ledger=str(tmp_path))

    def num_written() -> list[int]:
        lines = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
        return [json.loads(line)["completion_tokens"] for line in lines if json.loads(line)["status"] == "cancelled"]

    with serving(service) as url:
        body = {"prompt": ["Hello", "Good day"], "stream": True, "aft": {"num_layers": 0}, "max_tokens": 200}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            pieces = (line for line in response.iter_lines() if '"text":"' in line)
            assert next(pieces) and next(pieces)
        until = time.monotonic() + 5
        while len(num_written()) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    assert len(num_written()) == 2 and max(num_written()) < 100


@pytest.mark.parametrize("is_list", [True, False])
def test_ids_are_the_text_that_they_spell(engine: ScriptedEngine, is_list: bool) -> None:
    ids = make_tokenizer("llama3")("Hello there", add_special_tokens=False)["input_ids"]
    asked = complete(service_of(engine), prompt=[ids] if is_list else ids, seed=1).json()
    assert asked["choices"] == complete(service_of(engine), prompt="Hello there", seed=1).json()["choices"]


@pytest.mark.parametrize("prompt", ["Hello there", [[2, 3, 4]]], ids=["text", "ids"])
def test_echo_gives_the_log_probabilities_of_the_prompt_as_it_is(engine: ScriptedEngine, prompt: Any) -> None:
    reply = complete(service_of(engine), prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0).json()
    [request] = engine.requests
    ids = format_of("llama3").text_ids(prompt) if isinstance(prompt, str) else tuple(prompt[0])
    assert (request.prompt_ids, request.prompt_logprobs, request.sampling.max_tokens) == (ids, 1, 1)
    [choice] = reply["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *[-1.0] * len(ids)]
    assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == len(logprobs["text_offset"]) == len(ids) + 1
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][1] == {logprobs["tokens"][1]: -1.0}
    assert choice["text"].startswith(format_of("llama3").decode(ids) if not isinstance(prompt, str) else prompt)
    assert reply["usage"]["prompt_tokens"] == len(ids)


def test_each_prompt_of_a_list_is_echoed_before_its_own_answer(engine: ScriptedEngine) -> None:
    reply = complete(service_of(engine), prompt=["Hello", "Good day"], echo=True, n=2).json()
    assert [choice["text"].startswith(("Hello", "Good")) for choice in reply["choices"]] == [True] * 4
    assert [choice["text"][0] for choice in reply["choices"]] == ["H", "H", "G", "G"]


def test_echo_without_new_tokens_shows_the_prompt_alone(engine: ScriptedEngine) -> None:
    [choice] = complete(service_of(engine), prompt="Hello", echo=True, logprobs=0, max_tokens=0).json()["choices"]
    assert choice["text"] == "Hello"
    assert len(choice["logprobs"]["tokens"]) == len(format_of("llama3").text_ids("Hello"))


def test_log_probabilities_of_a_completion_are_those_of_its_tokens(engine: ScriptedEngine) -> None:
    [choice] = complete(service_of(engine), prompt="Hello", logprobs=2).json()["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"] == [0, len(choice["logprobs"]["tokens"][0])]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "Hello", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "Hello", "echo": True, "stream": True}, "stream"),
        ({"prompt": "Hello", "logprobs": 21}, "logprobs"),
        ({"prompt": "Hello", "tools": [1]}, "tools"),
    ],
)
def test_what_completions_cannot_do_is_refused_by_name(engine: ScriptedEngine, body: Any, param: str) -> None:
    assert refused(complete(service_of(engine), **body)) == (400, param)


def test_a_prompt_that_fails_fails_the_request(engine: ScriptedEngine) -> None:
    asked: dict[str, Any] = {"prompt": ["Hello", "word " * 9000], "max_tokens": 100}
    response = complete(service_of(engine), **asked)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "context_length_exceeded" in complete(service_of(engine), **asked, stream=True).text


def test_texts_and_ids_are_told_apart(engine: ScriptedEngine) -> None:
    service = service_of(engine)
    text = complete(service, "/tokenize", prompt="Hello there").json()
    assert tuple(text["tokens"]) == format_of("llama3").text_ids("Hello there")
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), 4096)
    messages = [{"role": "user", "content": "Hello there"}]
    chat = complete(service, "/tokenize", messages=messages).json()
    assert chat["tokens"][-1:] == list(format_of("llama3").prompt_tail[-1:])
    assert complete(service, "/detokenize", tokens=text["tokens"]).json()["prompt"].endswith("Hello there")
    assert refused(complete(service, "/tokenize")) == (400, "prompt")
    assert complete(service_over(ScriptedEngine(ScriptedEngineConfig())), "/tokenize", prompt="x").status_code == 400


@pytest.mark.parametrize("outside", [0, 2**30], ids=["the next", "a huge one"])
@pytest.mark.parametrize(
    ("path", "name", "more"),
    [
        ("/v1/completions", "prompt", {}),
        ("/v1/completions", "prompt", {"echo": True}),
        ("/detokenize", "tokens", {}),
    ],
    ids=["prompt", "echo", "detokenize"],
)
def test_ids_outside_the_vocabulary_are_refused_and_not_dropped(
    engine: ScriptedEngine, path: str, name: str, more: dict[str, Any], outside: int
) -> None:
    size = len(make_tokenizer("llama3"))
    reply = complete(service_of(engine), path, **{name: [2, size + outside]}, **more)
    assert refused(reply) == (400, name)
    assert f"token id {size + outside} is outside the model's vocabulary of {size} tokens" in reply.text
    assert complete(service_of(engine), path, **{name: [2, size - 1]}, **more).status_code == 200


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("logit_bias", {"logit_bias": {"{id}": 5}}),
        ("logit_bias", {"logit_bias": {"{id}": 5}, "aft": {"num_layers": 0}}),
        ("aft.proposal.logit_bias", {"aft": {"proposal": {"logit_bias": [["{id}", 5]]}}}),
        ("aft.aggregation.logit_bias", {"aft": {"num_layers": 2, "aggregation": [{"logit_bias": [["{id}", 5]]}]}}),
    ],
    ids=["final", "single", "drafts", "hidden layers"],
)
def test_a_bias_on_a_token_that_the_model_does_not_have_is_refused(
    engine: ScriptedEngine, name: str, body: dict[str, Any]
) -> None:
    size = len(make_tokenizer("llama3"))

    def ask(token: int) -> httpx.Response:
        filled = json.dumps(body).replace('["{id}"', f"[{token}").replace("{id}", str(token))
        return complete(service_of(engine), prompt="Hello", **json.loads(filled))

    assert refused(ask(size)) == (400, name)
    assert f"token id {size} is outside the model's vocabulary of {size} tokens" in ask(size).text
    assert not engine.requests
    assert ask(size - 1).status_code == 200


def test_the_usage_of_the_last_call_is_the_size_of_the_conversation(engine: ScriptedEngine) -> None:
    whole = complete(service_of(engine), prompt="Hello").json()["usage"]
    last = complete(service_of(engine, usage="last_call"), prompt="Hello").json()["usage"]
    layers = whole["aft"]["layers"]
    assert last["prompt_tokens"] == layers[-1]["prompt_tokens"] < whole["prompt_tokens"]
    assert last["completion_tokens"] == layers[-1]["completion_tokens"] < whole["completion_tokens"]
    assert last["aft"]["prompt_tokens"] == whole["prompt_tokens"]
    two = complete(service_of(engine, usage="last_call"), prompt=["Hello", "Hello"], n=2).json()["usage"]
    assert two["prompt_tokens"] == 2 * last["prompt_tokens"]
