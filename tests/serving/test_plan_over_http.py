"""Plans that make do with less, asked for in the body: visible in the answer, the usage and the drafts."""

from __future__ import annotations

from typing import Any

import openai

BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Name three rivers."}]}


def test_a_vote_is_asked_for_in_the_body_and_told_in_the_usage(client: openai.OpenAI) -> None:
    aft = {"num_proposals": 3, "aggregator": "vote", "include_proposals": True}
    completion: Any = client.chat.completions.create(**BODY, extra_body={"aft": aft})
    drafts, [answer] = completion.aft["layers"]
    assert [layer["decided_by"] for layer in completion.usage.aft["layers"]] == ["model", "vote"]
    assert completion.choices[0].message.content == answer["text"] == drafts[0]["text"]  # three different: a tie
    assert answer["inputs"] == [0]
    assert completion.usage.completion_tokens == 3 * 8


def test_agreement_skips_layers_and_a_stream_brings_the_answer_in_one_piece(split_url: str) -> None:
    with openai.OpenAI(base_url=f"{split_url}/v1", api_key="key-one", max_retries=0) as client:
        aft: dict[str, Any] = {"num_proposals": 2, "num_layers": 3, "early_stop": "exact", "include_proposals": True}
        completion: Any = client.chat.completions.create(**BODY, extra_body={"aft": aft})
        stream = client.chat.completions.create(**BODY, stream=True, extra_body={"aft": aft})
        pieces = [
            chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content
        ]
    assert [len(layer) for layer in completion.aft["layers"]] == [2, 2, 0, 1]
    decided = [layer["decided_by"] for layer in completion.usage.aft["layers"]]
    assert decided == ["model", "model", "agreement", "agreement"]
    assert pieces == [completion.choices[0].message.content] == ["written by the aggregator"]
