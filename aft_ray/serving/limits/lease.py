"""The room that one ingress replica may give to requests by itself, without asking the control. Pure.

    lease.take(cost)                 a request begins; False: ask the control
    lease.give_back(cost)            it has ended
    lease.reported() / .renewed()    a report is sent; its answer has come

The control counts a lease as used from the report that it answers to the next one, and a request of the lease as open
from the first report that names it. So whatever is taken and given back between two reports, all replicas together
admit no more than the limits. A lease ends `LEASE_S` after the report that it answers was sent, or when it is recalled;
one that nobody needs is returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aft_ray.serving.limits.admission import LEASE_S, LEAST_LEASE, Amount, Renewal


class Lease:
    """The lease of one ingress replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = Amount()
        self._until = -LEASE_S
        self._is_recalled = False
        self._number = 0
        self._kept = Amount()
        """What the last report said is kept, of which later takes are part."""
        self._sent = 0.0
        self._wishes = (Amount(), Amount())
        """Number and largest cost of the requests since the last report, and between the two reports before."""
        self.is_scarce = False
        """Whether the control gave less than the smallest lease when it was last asked for one."""

    @property
    def is_usable(self) -> bool:
        return not self._is_recalled and self._clock() < self._until

    @property
    def is_needed(self) -> bool:
        """Whether requests have come of late that a lease is for."""
        return any(wish.num_requests for wish in self._wishes)

    def take(self, num_tokens: int) -> bool:
        """Take the room of one request, if there is enough."""
        now, before = self._wishes
        largest = max(now.num_tokens, num_tokens)
        self._wishes = (Amount(num_requests=now.num_requests + 1, num_tokens=largest), before)
        if not self.is_usable or self._left.num_requests < 1 or self._left.num_tokens < num_tokens:
            return False
        self._add(-1, -num_tokens)
        return True

    def give_back(self, num_tokens: int) -> bool:
        """Return the room of one request to the lease; False where the lease has ended: tell the control instead."""
        if self.is_usable:
            self._add(1, num_tokens)
        return self.is_usable

    def reported(self) -> tuple[int, Amount, Amount]:
        """Return the number of the report that is about to be sent, what is kept, and what is wanted."""
        now, before = self._wishes
        self._wishes = (Amount(), now)
        num = max(now.num_requests, before.num_requests)
        wanted = Amount()
        if num and not self._is_recalled:
            requests = LEAST_LEASE + 2 * num
            wanted = Amount(num_requests=requests, num_tokens=requests * max(now.num_tokens, before.num_tokens))
        self._left = _least(self._left, wanted) if self.is_usable else Amount()
        self._number += 1
        self._kept, self._sent = self._left, self._clock()
        self.is_scarce = bool(wanted.num_requests)  # until the answer says otherwise
        return self._number, self._kept, wanted

    def renewed(self, renewal: Renewal) -> None:
        """Take the answer to a report. That to an older one than the last is out of date."""
        if renewal.number != self._number:
            return
        self._until, self._is_recalled = self._sent + LEASE_S, renewal.is_recalled
        lease, kept = renewal.lease, self._kept
        self._add(lease.num_requests - kept.num_requests, lease.num_tokens - kept.num_tokens)
        self.is_scarce = self.is_scarce and lease.num_requests < LEAST_LEASE

    def _add(self, num_requests: int, num_tokens: int) -> None:
        left = self._left
        self._left = Amount(num_requests=left.num_requests + num_requests, num_tokens=left.num_tokens + num_tokens)


def _least(one: Amount, other: Amount) -> Amount:
    return Amount(
        num_requests=min(one.num_requests, other.num_requests), num_tokens=min(one.num_tokens, other.num_tokens)
    )
