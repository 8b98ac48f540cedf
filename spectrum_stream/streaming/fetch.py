"""The ways to fetch the shards of a repo, and the traffic of each. Pure, so that a plan can use it.

    range      only the bytes of the matrices; requests bridge small gaps and are split where they are long
    download   whole shards, which are mapped, scanned and deleted; at most two are on disk at once
    cache      whole shards, which stay in the user's Hugging Face cache

A shard on this machine, in a folder or in that cache, is mapped where it lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from ..checkpoint import LocalShard, Shard
from ..errors import UsageError
from ..model.matrix import Matrix
from ..text import si_bytes

# The bytes [start, stop) of a tensor in its shard, or of a request.
Extent = tuple[int, int]

# The share of unneeded bytes, between two matrices, that may be fetched to save requests.
_WASTE = 0.01
# Requests of this size make latency negligible, and are cheap to repeat if one breaks off.
_REQUEST_NBYTES = 32 << 20
# Above this share of a shard, one download is faster than ranges: it may use Xet, and it can be resumed.
_SHARD_SHARE = 0.6
# The limit of memory for matrices that were fetched by range and are not computed yet; one matrix may exceed it.
AHEAD_NBYTES = 256_000_000
SHARDS_ON_DISK = 2


class Fetch(StrEnum):
    """The way to fetch a shard of a repo.

    A shard on this machine is mapped and has no `Fetch`.
    """

    AUTO = "auto"
    RANGE = "range"
    DOWNLOAD = "download"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Transfer:
    """The cost of one way to fetch.

    Attributes:
        nbytes: bytes to download, without headers.
        requests: the number of requests for weights, without redirects.
        disk_nbytes: the most bytes on disk at once.
    """

    nbytes: int
    requests: int
    disk_nbytes: int


def find_extents(matrices: Sequence[Matrix]) -> Mapping[str, list[Extent]]:
    """Return the extents of the matrices by shard.

    A tensor that two modules share appears twice.
    """
    extents: dict[str, list[Extent]] = {}
    for w in matrices:
        extents.setdefault(w.shard, []).append((w.start, w.start + w.nbytes))
    return extents


def plan_requests(extents: Sequence[Extent]) -> list[Extent]:
    """Return the ranges to request, in order.

    They cover each extent once, by one range or by adjoining ranges.

    The smallest gaps are bridged first, while the bytes in them stay below a hundredth of the wanted bytes.
    """
    wanted = sorted(set(extents))
    if not wanted:
        return []
    allowed = int(_WASTE * sum(stop - start for start, stop in wanted))
    gaps = sorted((after[0] - before[1], i) for i, (before, after) in enumerate(pairwise(wanted)))
    bridged = set()
    for nbytes, i in gaps:
        allowed -= max(nbytes, 0)
        if allowed < 0:
            break
        bridged.add(i)
    spans: list[Extent] = []
    for i, (start, stop) in enumerate(wanted):
        if i - 1 in bridged:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return [
        (start, min(start + _REQUEST_NBYTES, last))
        for first, last in spans
        for start in range(first, last, _REQUEST_NBYTES)
    ]


def choose_fetches(
    shards: Sequence[Shard],
    wanted: Mapping[str, Sequence[Extent]],
    fetch: Fetch,
    free_nbytes: int,
    max_disk_nbytes: int | None,
) -> Mapping[str, Fetch | None]:
    """Choose the way to fetch each shard, by name.

    Shards without a wanted extent are left out.

    Args:
        wanted: the extents of the matrices, by shard.
        fetch: the requested way.
        free_nbytes: free bytes of the disk that shards would be downloaded to.
        max_disk_nbytes: the limit of disk for such shards; None for no limit.

    Raises:
        UsageError: too_little_disk; the message has the number that is needed.
    """
    room = free_nbytes if max_disk_nbytes is None else min(free_nbytes, max_disk_nbytes)
    fetches: dict[str, Fetch | None] = {}
    for shard in shards:
        if not wanted.get(shard.name):
            continue
        if isinstance(shard, LocalShard):
            fetches[shard.name] = None
            continue
        share = sum(stop - start for start, stop in set(wanted[shard.name])) / shard.nbytes
        if fetch is Fetch.CACHE:
            fetches[shard.name] = Fetch.CACHE
        elif shard.is_ranged and (
            fetch is Fetch.RANGE or (fetch is Fetch.AUTO and (share <= _SHARD_SHARE or shard.nbytes > room))
        ):
            fetches[shard.name] = Fetch.RANGE
        else:
            fetches[shard.name] = Fetch.DOWNLOAD
    downloads = [s.nbytes for s in shards if fetches.get(s.name) is Fetch.DOWNLOAD]
    kept = sum(s.nbytes for s in shards if fetches.get(s.name) is Fetch.CACHE)
    enough = max(*downloads, kept, 0)
    if enough > room:
        raise UsageError(
            f"the shards need {si_bytes(enough)} of disk ({enough} bytes), but only {si_bytes(room)} are "
            + ("allowed" if room == max_disk_nbytes else "free"),
            reason="too_little_disk",
            hint="use --fetch range, which needs no disk"
            if all(s.is_ranged for s in shards if not isinstance(s, LocalShard))
            else None,
        )
    return fetches


def estimate_transfers(
    shards: Sequence[Shard], wanted: Mapping[str, Sequence[Extent]], max_disk_nbytes: int | None = None
) -> Mapping[Fetch, Transfer]:
    """Return the cost of each possible way for the remote shards; {} without any."""
    remote = [s for s in shards if wanted.get(s.name) and not isinstance(s, LocalShard)]
    if not remote:
        return {}
    ranges = [r for s in remote for r in plan_requests(wanted[s.name])]
    whole = sum(s.nbytes for s in remote)
    largest = sorted((s.nbytes for s in remote), reverse=True)
    at_once = sum(largest[:SHARDS_ON_DISK])
    if max_disk_nbytes is not None:
        at_once = min(at_once, max_disk_nbytes)
    costs = {
        Fetch.DOWNLOAD: Transfer(whole, len(remote), at_once),
        Fetch.CACHE: Transfer(whole, len(remote), whole),
    }
    if all(s.is_ranged for s in remote):
        costs = {Fetch.RANGE: Transfer(sum(stop - start for start, stop in ranges), len(ranges), 0), **costs}
    return costs


def count_fetched_nbytes(
    shards: Sequence[Shard], wanted: Mapping[str, Sequence[Extent]], fetches: Mapping[str, Fetch | None]
) -> int:
    """Count the bytes that come over the network with these fetches."""
    total = 0
    for shard in shards:
        fetch, extents = fetches.get(shard.name), wanted.get(shard.name, ())
        if fetch is Fetch.RANGE:
            total += sum(stop - start for start, stop in plan_requests(extents))
        elif fetch is not None and extents:
            total += shard.nbytes
    return total


def limit_ahead_nbytes(extents: Sequence[Extent]) -> int:
    """Return the most memory of matrices requested by range and not yet computed."""
    sizes = [stop - start for start, stop in set(extents)]
    # One request may contain the end of one matrix and several small ones.
    return min(sum(sizes), max(AHEAD_NBYTES, max(sizes, default=0)) + _REQUEST_NBYTES)
