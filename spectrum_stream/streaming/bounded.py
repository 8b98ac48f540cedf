"""The counters of a running scan: budgets that keep the reader from running too far ahead, and the traffic."""

import threading
from dataclasses import dataclass, field

from ..numerics import costs
from .fetch import AHEAD_NBYTES, SHARDS_ON_DISK

# The limit of bytes that are prefetched through a map. They are in the page cache, not in private memory.
_MAPPED_AHEAD_NBYTES = 1_000_000_000


class Closed(Exception):
    """The budget was closed, because the scan has ended."""


class Budget:
    """A limited amount that the reader takes from and the computation gives back to.

    Args:
        limit: the most that may be taken at once; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """The amount that was taken and not given back."""
        return self._taken

    def has_room(self, amount: int) -> bool:
        """Whether `take` would not wait.

        An amount above the limit has room when nothing else is taken.
        """
        return not self._taken or self._limit is None or self._taken + amount <= self._limit

    def is_over(self, amount: int) -> bool:
        """Whether the amount is above the limit."""
        return self._limit is not None and amount > self._limit

    def take(self, amount: int, beside: int = 0) -> None:
        """Take an amount, and wait until there is room for it.

        Args:
            beside: a part of the taken amount that cannot be given back before this call returns. If no more than
                this is taken, waiting would not help, so the call takes the amount although there is no room.

        Raises:
            Closed: the budget was closed during the wait or before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._taken <= beside or self.has_room(amount))
            if self._closed:
                raise Closed
            self._taken += amount

    def give(self, amount: int) -> None:
        """Give an amount back."""
        with self._changed:
            self._taken -= amount
            self._changed.notify()

    def close(self) -> None:
        """Make `take` raise `Closed` from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The limits of the reader's lead, one budget for each resource.

    Attributes:
        mapped: bytes that were read from a map and not yet taken by the computation.
        ranged: bytes that were requested by range and not yet released.
        parts: bytes of scales and zero points that were read and not yet released.
        shards: temporary shard downloads that are not deleted yet.
        disk: the bytes of those shards.
    """

    mapped: Budget = field(default_factory=lambda: Budget(_MAPPED_AHEAD_NBYTES))
    ranged: Budget = field(default_factory=lambda: Budget(AHEAD_NBYTES))
    parts: Budget = field(default_factory=lambda: Budget(costs.PARTS_AHEAD_NBYTES))
    shards: Budget = field(default_factory=lambda: Budget(SHARDS_ON_DISK))
    disk: Budget = field(default_factory=lambda: Budget(None))

    def close(self) -> None:
        """Close all of them."""
        for budget in (self.mapped, self.ranged, self.parts, self.shards, self.disk):
            budget.close()


@dataclass
class Traffic:
    """Counters of a running scan.

    Attributes:
        fetched_nbytes: bytes that came over the network, without headers.
        starved_s: seconds in which the computation waited for bytes.
    """

    fetched_nbytes: int = 0
    starved_s: float = 0.0
