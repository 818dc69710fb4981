"""The ledger: one JSON line per request with its cost, written however the request ends. It holds no prompt or answer.

    {"time": "2026-11-24T12:00:00.000+00:00", "request_id": "4c1e...", "id": "chatcmpl-...", "key": "alice", "model":
     "aft", "adapter": "/runs/mine/model/.versions/3f9c0a1b2c3d", "plan": "k5-l1", "status": "cancelled", "error": null,
     "prompt_tokens": 412, "completion_tokens": 96, "layers": [{"layer": 0, ...}], "seconds": 1.4}

`status` is `answered`, `failed` (with the error's code) or `cancelled` (the client disconnected). Each ingress replica
writes its own file in the folder. Of an answer that was cut off, the tokens count that were written until then; only a
replica that died takes its count with it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aft_ray.inference.events import LayerUsage
from aft_ray.serving.limits.admission import Admitted
from aft_ray.serving.limits.gate import Gate

logger = logging.getLogger("ray.serve.aft_ray")

Status = Literal["answered", "failed", "cancelled"]


class RequestLedger:
    """Appends to `<folder>/<day>-<process>.jsonl`. Without a folder nothing is written."""

    def __init__(self, folder: str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._process = f"{os.getpid()}-{uuid.uuid4().hex[:6]}"
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, bill: Bill) -> None:
        """Append one line. A full disk is logged and does not fail the request."""
        if self._folder is None:
            return
        entry = bill.entry()
        file = self._folder / f"{entry['time'][:10]}-{self._process}.jsonl"
        try:
            with file.open("a") as lines:
                lines.write(json.dumps(entry) + "\n")
        except OSError as error:
            logger.error("cannot write the ledger %s: %s", file, error)


@dataclass(kw_only=True)
class Bill:
    """The cost of one request, while it runs."""

    request_id: str
    id: str
    key: str
    model: str
    plan: str
    adapter: str | None = None
    on_usage: Callable[[LayerUsage], None] | None = None
    """Called with the usage of each layer too (metrics)."""
    layers: list[LayerUsage] = field(default_factory=list)
    status: Status = "cancelled"
    """Cancelled, unless the request is marked as answered or failed before it is closed."""
    error: str | None = None
    _started: float = field(default_factory=time.monotonic)

    def add(self, usage: LayerUsage) -> None:
        """Add the usage of a layer that is over (`on_usage` of `propose_and_aggregate`)."""
        self.layers.append(usage)
        if self.on_usage is not None:
            self.on_usage(usage)

    def failed(self, code: str) -> None:
        self.status, self.error = "failed", code

    @property
    def num_tokens(self) -> int:
        """Number of tokens, prompt and completion, of all layers so far."""
        return sum(layer.prompt_tokens + layer.completion_tokens for layer in self.layers)

    def entry(self) -> dict[str, Any]:
        """Return the ledger's entry for this request."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "id": self.id,
            "key": self.key,
            "model": self.model,
            "adapter": self.adapter,
            "plan": self.plan,
            "status": self.status,
            "error": self.error,
            "prompt_tokens": _sum("prompt_tokens", self.layers),
            "completion_tokens": _sum("completion_tokens", self.layers),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "seconds": round(time.monotonic() - self._started, 3),
        }


class OpenRequest:
    """A request that was admitted. `close` it however it ends: that reports it to the gate and the ledger, once."""

    def __init__(self, gate: Gate, ledger: RequestLedger, admitted: Admitted, bill: Bill) -> None:
        self.ticket = admitted.ticket
        self.room = admitted.room
        self.bill = bill
        self._gate = gate
        self._ledger = ledger
        self._is_closed = False

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._gate.leave(self.ticket, self.bill.num_tokens)
        self._ledger.write(self.bill)


def _sum(name: str, layers: Sequence[LayerUsage]) -> int:
    return sum(getattr(layer, name) for layer in layers)
