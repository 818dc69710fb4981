"""Propose-and-aggregate against the published schedule, on one engine: 32 prompts, K=4, L=1 and L=2.

    python benchmarks/propose_aggregate.py [--prompts 32] [--rounds 3] [--max-tokens 64]

published   batches of 8 prompts, in which every layer is a barrier and every sample is a separate request
ours        every prompt is a coroutine, and the K samples of a layer are one request

Both use the same prompts, templates, sampling and seeds, so they differ in scheduling alone. The sides alternate, and
the prefix cache is emptied before each.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aft_ray.config import load_config
from aft_ray.data.prompts import read_prompts
from aft_ray.engines import GenerateRequest, Sample, Sampling, build_engine
from aft_ray.inference import Plan, Role, propose_and_aggregate, run_to_end
from aft_ray.records import derive_seed
from aft_ray.templates import AggregatorTemplate, fit_aggregation
from aft_ray.templates.loading import load_format

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
WIDTH = 4
BATCH = 8

Row = dict[str, Any]


async def ours(rows: Sequence[Row], plan: Plan, role: Role, template: AggregatorTemplate) -> int:
    done = await asyncio.gather(
        *(
            run_to_end(
                propose_and_aggregate(
                    prompt_id=row["prompt_id"],
                    messages=row["messages"],
                    plan=plan,
                    proposer=role,
                    aggregator=role,
                    template=template,
                )
            )
            for row in rows
        )
    )
    return sum(usage.completion_tokens for one in done for usage in one.usage)


async def published(rows: Sequence[Row], plan: Plan, role: Role, template: AggregatorTemplate) -> int:
    names = itertools.count()
    num_tokens = 0

    async def sample(ids: Sequence[int], seed: int) -> Sample:
        request = GenerateRequest(
            request_id=f"published-{next(names)}",
            prompt_ids=tuple(ids),
            messages=(),
            sampling=plan.final,
            seeds=(seed,),
        )
        (only,) = [event async for event in role.engine.generate(request) if isinstance(event, Sample)]
        return only

    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        below: list[list[str]] = [[] for _ in batch]
        for layer in range(plan.num_layers + 1):
            width = 1 if layer == plan.num_layers else WIDTH
            prompts = [_prompt(row, texts, plan, role, template) for row, texts in zip(batch, below, strict=True)]
            samples = await asyncio.gather(
                *(
                    sample(ids, derive_seed(0, row["prompt_id"], layer, index))
                    for row, ids in zip(batch, prompts, strict=True)
                    for index in range(width)
                )
            )
            below = [[s.text for s in samples[i * width : (i + 1) * width]] for i in range(len(batch))]
            num_tokens += sum(s.num_tokens for s in samples)
    return num_tokens


def _prompt(row: Row, below: Sequence[str], plan: Plan, role: Role, template: AggregatorTemplate) -> Sequence[int]:
    if not below:
        return role.format.prompt_ids(row["messages"])
    room = role.engine.info.max_model_len - plan.final.max_tokens
    return fit_aggregation(role.format, template, row["messages"], below, room, "drop_longest").prompt_ids


async def compare(num_prompts: int, rounds: int, max_tokens: int) -> None:
    config = load_config(
        QUICKSTART,
        ["engine.type=vllm", "engine.max_num_seqs=256", "engine.seeds=false", f"prompts.limit={num_prompts}"],
    )
    rows = list(read_prompts(config.prompts))
    engine = build_engine(config.engine)
    sampling = Sampling(temperature=0.7, top_k=50, max_tokens=max_tokens)
    role = Role(engine=engine, format=load_format(engine.info))
    template = AggregatorTemplate.load("aft")
    print(f"propose-and-aggregate / published scheduling: {num_prompts} prompts, K={WIDTH}, vLLM, one engine")
    print(f"{'L':>2} {'round':>5} {'published tok/s':>16} {'ours tok/s':>11} {'ratio':>6} {'seconds':>15}")
    for num_layers in (1, 2):
        plan = Plan(
            num_proposals=WIDTH, num_layers=num_layers, proposal=sampling, aggregation=(sampling,), final=sampling
        )
        ratios = []
        for number in range(rounds):
            rates, seconds = [], []
            for side in (published, ours):
                await engine.reset_prefix_cache()  # type: ignore[attr-defined]
                start = time.monotonic()
                tokens = await side(rows, plan, role, template)
                seconds.append(time.monotonic() - start)
                rates.append(tokens / seconds[-1])
            ratios.append(rates[1] / rates[0])
            times = f"{seconds[0]:.1f} / {seconds[1]:.1f}"
            print(
                f"{num_layers:>2} {number:>5} {rates[0]:>16.1f} {rates[1]:>11.1f} {ratios[-1]:>6.2f} {times:>15}",
                flush=True,
            )
        print(f"L={num_layers}: median ratio {statistics.median(ratios):.2f}  (goal >= 1.5; on a GPU 3)")
    await engine.close()
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64, help="per answer")
    arguments = parser.parse_args()
    asyncio.run(compare(arguments.prompts, arguments.rounds, arguments.max_tokens))


if __name__ == "__main__":
    main()
