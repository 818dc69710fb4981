"""lm-eval's `local-chat-completions` generates through the endpoint, several requests at once. Run by
test_stock_clients.py."""

from __future__ import annotations

import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion

url = sys.argv[1]
client = LocalChatCompletion(
    base_url=f"{url}/v1/chat/completions", model="aft", num_concurrent=4, max_retries=1, tokenized_requests=False
)
requests = [
    Instance(
        request_type="generate_until",
        doc={},
        arguments=(
            client.apply_chat_template([{"role": "user", "content": f"Question {number}?"}]),
            {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0},
        ),
        idx=number,
    )
    for number in range(8)
]
answers = client.generate_until(requests, disable_tqdm=True)
assert len(answers) == 8 and all(answers), answers
