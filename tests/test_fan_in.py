"""Several writers, one stream: nothing is lost, nothing is left running."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from aft_ray.fan_in import Emit, fan_in
from tests.inference.scripted_runs import run


async def counting(emit: Emit[int]) -> None:
    for number in range(3):
        emit(number)
        await asyncio.sleep(0)


async def stuck(emit: Emit[int]) -> None:
    emit(99)
    await asyncio.Event().wait()


async def failing(emit: Emit[int]) -> None:
    emit(-1)
    raise ValueError("as it is")


def test_everything_emitted_comes_out_and_the_stream_ends_with_the_last_writer() -> None:
    async def read() -> list[int]:
        return [item async for item in fan_in([counting, counting])]

    assert sorted(run(read())) == [0, 0, 1, 1, 2, 2]


def test_a_stream_without_writers_is_over_at_once() -> None:
    async def read() -> list[int]:
        return [item async for item in fan_in([])]

    assert run(read()) == []


def test_an_exception_comes_after_what_was_emitted_and_stops_the_others() -> None:
    seen: list[int] = []

    async def read() -> None:
        async for item in fan_in([failing, stuck]):
            seen.append(item)

    with pytest.raises(ValueError, match="as it is"):
        run(read())
    assert seen == [-1, 99]


def test_breaking_off_waits_until_every_writer_has_ended() -> None:
    ended: list[str] = []

    async def slow_to_end(emit: Emit[int]) -> None:
        emit(1)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append("cleaned up")

    async def read() -> None:
        async with aclosing(fan_in([slow_to_end, slow_to_end])) as items:
            async for _ in items:
                break
        assert ended == ["cleaned up"] * 2

    run(read())
