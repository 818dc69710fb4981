"""The actor that all ingress replicas ask: whether a request is admitted, and which adapter a model name stands for.

Serve keeps it alive with the Ingress deployment and starts another one when it dies; `gate.py` says how a server
survives that.
Serve pickles this module by value, so the records that travel to other processes are defined in `admission.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aft_ray.config import AdmissionConfig, KeyLimits
from aft_ray.serving.adapters import Adapter, AdapterStamp
from aft_ray.serving.limits.admission import (
    LEASE_S,
    Admission,
    Admitted,
    Amount,
    Refusal,
    Renewal,
    Report,
    Room,
    Table,
    Ticket,
    Wait,
)


class Control:
    """The state that all ingress replicas share. Its methods run one after the other."""

    def __init__(self, admission: AdmissionConfig, adapters: Mapping[str, str]) -> None:
        self._admission = Admission(admission)
        self._table = Table.configured(adapters)
        self._watcher: str | None = None
        self._id = uuid.uuid4().hex
        self._learns_until = 0.0
        """A successor knows all open requests and leases after so long: whoever does not report can admit no more."""

    def admit(
        self,
        ingress: str,
        ticket: Ticket,
        limits: KeyLimits,
        names: Sequence[str | None],
        may_wait: bool = True,
    ) -> Admitted | Refusal | Wait | Table:
        """Admit a request with the adapters that `names` stand for now (None: the base model), or refuse it.

        Returns the `Table` where a name no longer stands for an adapter, or the server is draining. `may_wait`: whether
        it may wait for leases that are recalled; for a control that learns it has to.
        """
        if self._is_learning:
            return Wait()
        adapters = self._table.adapters
        if self._table.draining or any(name is not None and name not in adapters for name in names):
            return self._table
        paths = tuple(None if name is None else adapters[name].path for name in names)
        ticket = Ticket(id=ticket.id, key=ticket.key, num_tokens=ticket.num_tokens, adapters=paths)
        refusal = self._admission.admit(ingress, ticket, limits, may_wait=may_wait)
        if isinstance(refusal, Wait):
            return refusal
        room = self.room(ticket.key, limits)
        if refusal is not None:
            return replace(refusal, room=room)
        return Admitted(ticket=ticket, table=self._table, room=room)

    def room(self, key: str, limits: KeyLimits) -> Room:
        """Return what a key has left now."""
        return self._admission.room(key, limits)

    def release(self, ingress: str, ticket_id: str, num_tokens: int) -> None:
        self._admission.release(ingress, ticket_id, num_tokens)

    def renew(self, report: Report) -> Renewal:
        """Take the report of an ingress replica, and return the current table and a lease."""
        if report.control not in (None, self._id) and not self._learns_until:
            self._learns_until = time.monotonic() + LEASE_S
        admission = self._admission
        admission.renew(report.ingress, report.tickets, report.asking)
        if report.num_ended:
            admission.note_ended(report.num_ended, report.mean_seconds)
        if report.table.version > self._table.version:  # this actor is new: it learns from those who knew the old one
            self._table = report.table
        gives = not self._is_learning and not self._table.draining
        lease = admission.lease(report.ingress, report.kept, report.wanted if gives else Amount())
        return Renewal(
            number=report.number,
            control=self._id,
            table=self._table,
            lease=lease,
            is_recalled=admission.is_recalled,
        )

    @property
    def _is_learning(self) -> bool:
        return time.monotonic() < self._learns_until

    def change(
        self,
        *,
        move: Mapping[str, Adapter | None] | None = None,
        taken: Mapping[str, AdapterStamp] | None = None,
        drain: bool | None = None,
    ) -> Table | Wait:
        """Move names to adapters (None removes a name), note which adapters of the watched folder are taken, or start
        or stop draining: one step for all ingress replicas. It first waits until nobody admits from a lease.
        """
        if self._admission.has_leases or self._is_learning:
            self._admission.recall()
            return Wait()
        adapters = {**self._table.adapters, **(move or {})}
        self._table = Table(
            version=max(self._table.version + 1, time.time_ns()),  # a new actor continues the numbering
            adapters={name: adapter for name, adapter in adapters.items() if adapter is not None},
            taken={**self._table.taken, **(taken or {})},
            draining=self._table.draining if drain is None else drain,
        )
        return self._table

    def may_watch(self, ingress: str) -> bool:
        """Whether this ingress replica watches the folder: the first one that asked does, until it is lost."""
        self._admission.note_alive(ingress)
        if self._watcher is None or self._admission.is_lost(self._watcher):
            self._watcher = ingress
        return self._watcher == ingress

    def open_requests(self) -> dict[str, Any]:
        """Return the requests and tokens under way, for the admin routes and for draining."""
        tickets = self._admission.tickets
        paths = [path for ticket in tickets for path in set(ticket.adapters) if path is not None]
        return {
            "num_requests": len(tickets),
            "num_tokens": sum(ticket.num_tokens for ticket in tickets),
            "requests_by_key": dict(self._admission.num_open_by_key()),
            "requests_by_adapter": {path: paths.count(path) for path in dict.fromkeys(paths)},
            "draining": self._table.draining,
        }
