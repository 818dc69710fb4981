"""Leases: ingress replicas admit by themselves, and all of them together never more than the limit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from aft_ray.config import AdmissionConfig, KeyLimits, ScriptedEngineConfig, ServingConfig
from aft_ray.serving.adapters import Adapter
from aft_ray.serving.errors import HttpError
from aft_ray.serving.limits import admission, gate
from aft_ray.serving.limits.admission import LOST_S, Admission, Admitted, Amount, Refusal, Ticket, Wait
from aft_ray.serving.limits.control import Control
from aft_ray.serving.limits.gate import Gate

CONFIG = ServingConfig(engine=ScriptedEngineConfig(), adapters={"aft": "/first"})
NONE = KeyLimits()
TEN = Amount(num_requests=10, num_tokens=1000)


class Wire:
    """Calls a control as one process calls an actor: in order, with delays. A successor may replace `control`."""

    def __init__(self, control: Control, rng: random.Random) -> None:
        self.control, self._rng = control, rng
        self._way = asyncio.Lock()
        self.asked = set[str]()
        """The tickets that the control was asked to admit."""
        self.on_admitted: Callable[[Ticket], None] = lambda ticket: None
        """Called when the control admits a request: the answer reaches its gate later, and not in order."""

    async def __call__(
        self, method: str, *args: Any, state: Callable[[], tuple[Any, ...]] = tuple, **kwargs: Any
    ) -> Any:
        args = (*args, *state())
        if method == "admit":
            self.asked.add(args[1].id)
        async with self._way:
            await asyncio.sleep(self._rng.uniform(0, 0.001))
            answer = getattr(self.control, method)(*args, **kwargs)
            if isinstance(answer, Admitted):
                self.on_admitted(answer.ticket)
        await asyncio.sleep(self._rng.uniform(0, 0.01))
        return answer


@asynccontextmanager
async def gates(wires: Sequence[Wire]) -> AsyncIterator[list[Gate]]:
    """Yield the gates of several ingress replicas, which report as they do in a server."""
    found = [Gate(wire, CONFIG) for wire in wires]
    tasks = [asyncio.create_task(one.keep_renewing()) for one in found]
    yield found
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def ticket(name: object, num_tokens: int = 10) -> Ticket:
    return Ticket(id=str(name), key="", num_tokens=num_tokens)


async def leased(one: Gate, wire: Wire) -> None:
    """Ask until the gate admits from a lease."""
    for number in range(1000):
        one.leave((await one.enter(ticket(f"first {number}"), NONE, ["aft"])).ticket, 1)
        if f"first {number}" not in wire.asked:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("there never was a lease")


@pytest.mark.parametrize("limits", [{"max_requests": 40}, {"max_tokens": 400}, {"max_requests": 3}])
def test_the_limit_holds_over_two_gates_whatever_they_are_asked(
    limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts that go far over the limit and quiet times: it is reached, and never passed."""
    monkeypatch.setattr(gate, "LEASED_RENEW_S", 0.05)
    monkeypatch.setattr(admission, "RECALL_S", 0.2)
    limit = limits.get("max_requests", limits.get("max_tokens", 0) // 10)
    rng = random.Random(0)
    wires = [Wire(control := Control(AdmissionConfig(**limits), {"aft": "/first"}), rng) for _ in range(2)]
    wires[1].control = control = wires[0].control
    num_open, most, outcomes = 0, 0, list[bool]()

    async def ask(one: Gate, number: int) -> None:
        nonlocal num_open, most
        try:
            admitted = await one.enter(ticket(number), NONE, ["aft"])
        except HttpError as error:
            assert error.status == 429
            outcomes.append(False)
            return
        num_open += 1
        most = max(most, num_open)
        outcomes.append(True)
        await asyncio.sleep(rng.uniform(0, 0.1))
        num_open -= 1
        one.leave(admitted.ticket, 1)

    async def run() -> None:
        async with gates(wires) as both:
            async with asyncio.TaskGroup() as tasks:
                for number in range(800):
                    is_burst = number // 200 % 2
                    one = both[0] if rng.random() < (0.9 if number // 100 % 2 else 0.3) else both[1]
                    tasks.create_task(ask(one, number))
                    await asyncio.sleep(0 if is_burst and number % 40 else 0.003)
            await asyncio.gather(*(one.renew() for one in both))

    asyncio.run(run())
    num_asked = sum(len(wire.asked) for wire in wires)
    assert 0.9 * limit < most <= limit
    assert not all(outcomes)
    if limit > 10:
        assert num_asked < len(outcomes), "nothing was admitted from a lease"
    else:
        assert num_asked == len(outcomes), "a limit of few requests leaves no room for leases"
    assert control.open_requests()["num_requests"] == 0


def test_requests_of_a_busy_gate_ask_nobody_and_those_of_a_limited_key_always_ask() -> None:
    async def run() -> set[str]:
        wire = Wire(Control(AdmissionConfig(), {"aft": "/first"}), random.Random(0))
        async with gates([wire]) as [one]:
            await leased(one, wire)
            wire.asked.clear()
            for number in range(4):
                await one.enter(ticket(number), NONE, ["aft"])
            await one.enter(ticket("limited"), KeyLimits(max_requests=2), ["aft"])
            assert (await one.open_requests())["num_requests"] == 5
            return wire.asked

    assert asyncio.run(run()) == {"limited"}


def test_a_request_that_finds_no_room_but_leased_room_waits_for_it() -> None:
    """The other gate is idle, and returns its lease as soon as it hears of it."""

    async def run() -> int:
        rng = random.Random(0)
        first, second = (Wire(control, rng) for control in [Control(AdmissionConfig(max_requests=20), {})] * 2)
        async with gates([first, second]) as [holder, other]:
            for number in range(6):
                holder.leave((await holder.enter(ticket(f"first {number}"), NONE, [])).ticket, 1)
            await asyncio.sleep(0.2)
            assert first.control._admission.has_leases
            entered = await asyncio.gather(*(other.enter(ticket(number), NONE, []) for number in range(20)))
            with pytest.raises(HttpError, match="limit of 20"):
                await holder.enter(ticket("more"), NONE, [])
            return len(entered)

    assert asyncio.run(run()) == 20


def test_what_a_dead_gate_had_leased_comes_back_when_it_is_lost() -> None:
    now = 1000.0
    control = Admission(AdmissionConfig(max_requests=20), lambda: now)
    control.renew("dead", [ticket("its own")])
    assert control.lease("dead", Amount(), TEN).num_requests == 4
    for number in range(15):
        assert control.admit("alive", ticket(number), NONE) is None
    assert isinstance(control.admit("alive", ticket("last"), NONE), Wait)
    assert isinstance(control.admit("alive", ticket("last"), NONE, may_wait=False), Refusal)
    now += LOST_S - 1
    control.note_alive("alive")
    now += 2
    for number in range(15, 20):
        assert control.admit("alive", ticket(number), NONE) is None
    assert isinstance(control.admit("alive", ticket("more"), NONE), Refusal)


def test_a_change_waits_for_every_lease_and_then_nobody_admits_by_the_old_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "RECALL_S", 0.5)

    async def run() -> None:
        rng = random.Random(0)
        wires = [Wire(control, rng) for control in [Control(AdmissionConfig(), {"aft": "/first"})] * 2]
        paths: list[str | None] = []
        """The adapter of each request, in the order of admission, by the control or from a lease."""
        for wire in wires:
            wire.on_admitted = lambda ticket: paths.append(ticket.adapters[0])

        async def keep_asking(one: Gate, wire: Wire, name: str, until: asyncio.Event) -> None:
            number = 0
            while not until.is_set():
                number += 1
                admitted = await one.enter(asked := ticket(f"{name} {number}"), NONE, ["aft"])
                if asked.id not in wire.asked:
                    paths.append(admitted.ticket.adapters[0])
                await asyncio.sleep(0.005)
                one.leave(admitted.ticket, 1)

        async with gates(wires) as both:
            for one, wire in zip(both, wires, strict=True):
                await leased(one, wire)
            until = asyncio.Event()
            asking = [
                asyncio.create_task(keep_asking(one, wire, str(number), until))
                for number, (one, wire) in enumerate(zip(both, wires, strict=True))
            ]
            await asyncio.sleep(0.1)
            await both[0].change(move={"aft": Adapter(path="/second", version="2")})
            await asyncio.sleep(0.1)
            until.set()
            await asyncio.gather(*asking)
            await both[1].change(drain=True)
            for one in both:
                with pytest.raises(HttpError, match="shutting down"):
                    await one.enter(ticket("late"), NONE, ["aft"])
        moved = paths.index("/second")
        assert set(paths[:moved]) == {"/first"} and set(paths[moved:]) == {"/second"}

    asyncio.run(run())


def test_a_successor_of_the_control_admits_nobody_before_it_knows_what_others_have_admitted() -> None:
    async def run() -> int:
        rng = random.Random(0)
        control = Control(AdmissionConfig(max_requests=20), {})
        wires = [Wire(control, rng), Wire(control, rng)]
        async with gates(wires) as [one, other]:
            for number in range(6):
                one.leave((await one.enter(ticket(f"first {number}"), NONE, [])).ticket, 1)
            await asyncio.sleep(0.2)
            for number in range(3):  # from the lease, and in no report yet
                await one.enter(ticket(f"leased {number}"), NONE, [])
            successor = Control(AdmissionConfig(max_requests=20), {})
            await other.renew()
            for wire in wires:
                wire.control = successor
            await other.renew()
            entered = 0
            with suppress(HttpError):
                while True:
                    await other.enter(ticket(f"other {entered}"), NONE, [])
                    entered += 1
            return entered

    assert asyncio.run(run()) == 17
