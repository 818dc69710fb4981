"""Real LoRA adapters moved on real engines while they serve: after every move the answers are those of plain peft."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from aft_ray.config import EngineConfig, ReplicaConfig, ServingConfig, TransformersEngineConfig, VllmEngineConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving import content_named, serve_app, stop
from aft_ray.templates import ChatFormat
from tests.training.tiny import write_model

pytestmark = pytest.mark.soak
QUESTION: Any = [{"role": "user", "content": "the old green river near a small town"}]
GREEDY = Sampling(temperature=0.0, max_tokens=12)
ADMIN = {"authorization": "Bearer ops"}


class Truth:
    """The answers of plain transformers and peft."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.format = ChatFormat.load(str(model))

    def answer(self, adapter: Path | None) -> str:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        ids = torch.tensor([self.format.prompt_ids(QUESTION)])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY.max_tokens, do_sample=False
        )
        text: str = self.format.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return text


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write random weights, large enough to change every answer."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(write_model(tmp_path_factory.mktemp("model"), hidden_size=128))  # heads that vLLM has a CPU kernel for


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.model)])
def server(request: pytest.FixtureRequest, truth: Truth, ray_cluster: None, tmp_path: Path) -> Iterator[str]:
    engine: EngineConfig = (
        TransformersEngineConfig(model=str(truth.model), max_model_len=128, dtype="float32")
        if request.param == "transformers"
        else VllmEngineConfig(
            model=str(truth.model), max_model_len=128, dtype="float32", max_num_seqs=8, max_lora_rank=8, max_adapters=1
        )
    )
    keys = {"ops": {"sha256": hashlib.sha256(b"ops").hexdigest(), "admin": True}}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(keys))
    config = ServingConfig(
        engine=engine,
        adapters={"aft": str(write_adapter(tmp_path / "first", truth.model, 1))},
        plan=Plan(num_layers=0, proposal=GREEDY, final=GREEDY),
        port=0,
        route_prefix="/swap",
        ingress=ReplicaConfig(num_cpus=0.1),
        aggregator=ReplicaConfig(num_cpus=0.5),
        keys_file=str(tmp_path / "keys.yaml"),
    )
    yield serve_app(content_named(config), name="swap")
    stop("swap")


def ask(url: str, model: str) -> str:
    body = {"model": model, "messages": QUESTION}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=ADMIN, timeout=120)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def move(url: str, folder: Path, name: str = "aft") -> None:
    body = {"name": name, "path": str(folder)}
    response = httpx.post(f"{url}/admin/adapters", json=body, headers=ADMIN, timeout=180)
    assert response.status_code == 200, response.text


def test_after_every_move_a_name_answers_with_the_weights_it_stands_for(
    server: str, truth: Truth, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", write_adapter(tmp_path / "second", truth.model, 2)
    third = write_adapter(tmp_path / "third", truth.model, 3)
    expected = [truth.answer(adapter) for adapter in (None, first, second, third)]
    base, by_first, by_second, by_third = expected
    assert len(set(expected)) == 4, "adapters that answer alike would show nothing"

    assert (ask(server, "base"), ask(server, "aft")) == (base, by_first)
    move(server, second)
    assert (ask(server, "aft"), ask(server, "base")) == (by_second, base)
    # Other weights in the very folder that the engine has loaded before: what it keeps by folder must not answer.
    shutil.copytree(third, second, dirs_exist_ok=True)
    assert ask(server, "aft") == by_second
    move(server, second)
    assert ask(server, "aft") == by_third
    # Two versions side by side on one engine, which holds one adapter at a time.
    move(server, first, "old")
    assert [ask(server, name) for name in ("old", "aft", "base", "old")] == [by_first, by_third, base, by_first]


@pytest.mark.parametrize("server", ["transformers"], indirect=True)
def test_an_adapter_of_the_config_stays_what_it_was_when_the_server_started(
    server: str, truth: Truth, tmp_path: Path
) -> None:
    """Engines load it with its first request, which may come to a replica that starts long afterwards."""
    first, other = tmp_path / "first", write_adapter(tmp_path / "other", truth.model, 4)
    by_first, by_other = truth.answer(first), truth.answer(other)
    assert by_first != by_other
    shutil.copytree(other, first, dirs_exist_ok=True)
    assert ask(server, "aft") == by_first
