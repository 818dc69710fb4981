"""lm-eval's own client for text completions asks for log-likelihoods and gets those of the engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from tests.serving.local_server import serving
from tests.serving.test_completions import service_of
from tests.templates.families import format_of, make_tokenizer

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("tenacity") is None,
        reason="lm-eval and its client's packages are not installed",
    ),
]


@pytest.mark.parametrize("as_ids", [True, False], ids=["ids", "text"])
def test_log_likelihoods_are_those_of_the_continuation(tmp_path: Path, as_ids: bool) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    make_tokenizer("chatml").save_pretrained(tmp_path)
    engine = ScriptedEngine(ScriptedEngineConfig(tokenizer=str(tmp_path)))
    pairs = [("Hello", " there"), ("Good", " day and night")]
    with serving(service_of(engine, format_of("chatml"))) as url:
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="base",
            tokenizer=str(tmp_path),
            tokenized_requests=as_ids,
            batch_size=1,
        )
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
            for index, pair in enumerate(pairs)
        ]
        found = client.loglikelihood(requests, disable_tqdm=True)
    tokenizer = make_tokenizer("chatml")
    expected = [-1.0 * len(tokenizer(continuation)["input_ids"]) for _, continuation in pairs]
    assert [round(likelihood, 6) for likelihood, _ in found] == expected
    assert all(is_greedy for _, is_greedy in found)
