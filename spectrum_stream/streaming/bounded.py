"""What a scan counts while it reads: budgets that keep the reader from running too far ahead, and the traffic."""

import threading
from dataclasses import dataclass, field

from ..numerics import costs
from .fetch import AHEAD_NBYTES, SHARDS_ON_DISK

# How far a map is read ahead. These bytes are in the page cache, not in the private memory of the process.
_MAPPED_AHEAD_NBYTES = 1_000_000_000


class Closed(Exception):
    """The budget was closed: the scan has ended, and nobody wants more."""


class Budget:
    """An amount that the reader takes from and the computation gives back to, in two threads.

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
        """Whether `take` would not wait. An amount above the limit has room when nothing else is taken."""
        return not self._taken or self._limit is None or self._taken + amount <= self._limit

    def is_over(self, amount: int) -> bool:
        """Whether the amount is above the limit."""
        return self._limit is not None and amount > self._limit

    def take(self, amount: int, beside: int = 0) -> None:
        """Take an amount, and wait until there is room for it.

        Args:
            beside: a part of what is taken that nobody can give back before this call returns. When no more than
                that is taken, waiting would not help, and the amount is taken without room for it.

        Raises:
            Closed: while it waited, or before.
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
        """Let `take` raise `Closed` from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify()


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """How far the reader may be ahead of the computation, one budget for each resource.

    Attributes:
        mapped: bytes that were read from a map and not yet taken by the computation.
        ranged: bytes that were requested by range and not yet released.
        parts: bytes of scales and zero points that were read and not yet released.
        shards: shards that were downloaded to be deleted, and are not deleted yet.
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
