"""An engine that sleeps, as Ray Serve LLM asks its engines: `serving.py --beside-llm` measures its application with it.

RAYLLM_VLLM_ENGINE_CLS=serve_llm_engine.SleepingEngine
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.llm._internal.serve.core.engine.protocol import LLMEngine

NUM_TOKENS = 8


class SleepingEngine(LLMEngine):
    """Answers every chat in one piece, with 8 words. `user` says how many seconds each of them takes."""

    def __init__(self, llm_config: Any) -> None:
        self.model = llm_config.model_id

    async def start(self) -> None:
        from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse

        self.reply = ChatCompletionResponse

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        seconds_per_token = float(request.user)
        for _ in range(NUM_TOKENS if seconds_per_token else 0):
            await asyncio.sleep(seconds_per_token)
        message = {"role": "assistant", "content": " ".join(["word"] * NUM_TOKENS)}
        yield self.reply.model_validate(
            {
                "id": request.request_id,
                "created": int(time.time()),
                "model": self.model,
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3, "completion_tokens": NUM_TOKENS, "total_tokens": 3 + NUM_TOKENS},
            }
        )

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def check_health(self) -> None:
        return None


SleepingEngine.__abstractmethods__ = frozenset()  # nothing else is asked of it
