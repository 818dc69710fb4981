"""A worker for the proposals stage that takes turns with the bare engine.

It has its own module because Ray's actors import it by name.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from aft_ray.config import Config
from aft_ray.data.proposals import Part, ProposalWorker, Sampler, sample_all
from aft_ray.engines import GenerateRequest
from aft_ray.shards import Processed

Rate = tuple[int, float]
"""A number of tokens, and the seconds in which they were generated."""


class PairedWorker(ProposalWorker):
    """Lets the rows through round by round; the bare engine answers a round's requests before and after the stage does.

    One engine in one process does both sides, so they differ by nothing but the stage, and the two bare runs around it
    show how much the machine drifted meanwhile. Every run starts with an empty prefix cache.
    """

    def __init__(self, log: Path, rows: list[dict[str, Any]], num_rounds: int, config: Config, part: Part) -> None:
        super().__init__(config, part)
        assert isinstance(self.writer, Sampler)
        self.log, self.sampler = log, self.writer
        self.round_of = {row["prompt_id"]: i * num_rounds // len(rows) for i, row in enumerate(rows)}
        self.requests: list[list[GenerateRequest]] = [[] for _ in range(num_rounds)]
        for row in rows:
            request = self.sampler._request(row["prompt_id"], row["messages"], part.num_proposals)
            self.requests[self.round_of[row["prompt_id"]]].append(request)
        self.opened = [asyncio.Event() for _ in range(num_rounds)]
        self.num_done = [0] * num_rounds
        self.num_tokens = [0] * num_rounds
        self.began = 0.0
        self.bare: list[Rate] = []
        self.first: asyncio.Task[None] | None = None

    async def process(self, row: dict[str, Any]) -> Processed:
        if self.first is None:
            self.first = asyncio.create_task(self._warm_up())
        number = self.round_of[row["prompt_id"]]
        await self.opened[number].wait()
        done = await super().process(row)
        self.num_done[number] += 1
        self.num_tokens[number] += done.completion_tokens
        if self.num_done[number] == len(self.requests[number]):
            await self._end(number)
        return done

    async def _warm_up(self) -> None:
        await self._ask_bare(0)
        await self._open(0)

    async def _open(self, number: int) -> None:
        self.bare = [await self._ask_bare(number)]
        await self._forget()
        self.began = time.monotonic()
        self.opened[number].set()

    async def _end(self, number: int) -> None:
        stage = self.num_tokens[number], time.monotonic() - self.began
        self.bare.append(await self._ask_bare(number))
        with self.log.open("a") as log:
            log.write(json.dumps({"stage": stage, "bare": self.bare}) + "\n")
        if number + 1 < len(self.opened):
            await self._open(number + 1)

    async def _ask_bare(self, number: int) -> Rate:
        """Send all requests of a round to the engine at once, without the stage."""
        await self._forget()
        began = time.monotonic()
        answers = await asyncio.gather(*(sample_all(self.sampler.engine, request) for request in self.requests[number]))
        return sum(sample.num_tokens for samples in answers for sample in samples), time.monotonic() - began

    async def _forget(self) -> None:
        await self.sampler.engine.reset_prefix_cache()  # type: ignore[attr-defined]  # a VllmEngine
