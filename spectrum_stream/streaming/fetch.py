"""How the bytes of a remote checkpoint are fetched, and what each way would take. Pure, so that a plan can say it.

    range    only the bytes of the matrices: requests merged across small gaps and split where they are long
    shard    whole shards, downloaded, mapped, scanned and deleted, two on disk at most
    cache    whole shards, kept in the user's Hugging Face cache

What is on this machine already, in a folder or in that cache, is mapped where it lies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from ..checkpoint import LocalShard, Shard
from ..errors import UsageError

# Bytes of a tensor in its shard, or of a request: [start, stop).
Extent = tuple[int, int]

# Bytes between two matrices that are fetched to save a request, as a share of the bytes wanted.
_WASTE = 0.01
# Long enough for the latency of a request not to count, short enough for a broken one to be asked again.
_REQUEST_NBYTES = 32 << 20
# When more of a shard than this is wanted, one download of it beats ranges: it may use Xet, and it can be resumed.
_SHARD_SHARE = 0.6
# What ranges bring may wait in memory up to this much, or one matrix.
AHEAD_NBYTES = 256_000_000
SHARDS_ON_DISK = 2


class Fetch(StrEnum):
    """How shards of a repo are fetched. A shard that is on this machine is mapped where it lies, and has none."""

    AUTO = "auto"
    RANGE = "range"
    DOWNLOAD = "download"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What it takes to fetch one way.

    Attributes:
        nbytes: to download.
        requests: for weights; headers have been read by then, and redirects are not counted.
        disk_nbytes: the most that is on disk at once.
    """

    nbytes: int
    requests: int
    disk_nbytes: int


def requests(extents: Sequence[Extent]) -> list[Extent]:
    """The ranges to ask for, in order, so that every extent lies within one or in several that adjoin.

    The smallest gaps are bridged first, as far as the bytes in them stay below a hundredth of those wanted.
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
    """The way of each shard that has anything wanted in it.

    Args:
        wanted: the extents of each shard's matrices, by the shard's name.
        free_nbytes: on the disk that shards would be downloaded to.
        max_disk_nbytes: how much of it they may take.

    Raises:
        UsageError: too_little_disk, with the number that would do.
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
            f"the shards take {enough} bytes of disk, and {room} are "
            + ("allowed" if room == max_disk_nbytes else "free"),
            reason="too_little_disk",
            hint="--fetch range needs none"
            if all(s.is_ranged for s in shards if not isinstance(s, LocalShard))
            else None,
        )
    return fetches


def transfers(
    shards: Sequence[Shard], wanted: Mapping[str, Sequence[Extent]], max_disk_nbytes: int | None = None
) -> Mapping[Fetch, Transfer]:
    """What each way would take for the shards that are not on this machine; empty where all are."""
    remote = [s for s in shards if wanted.get(s.name) and not isinstance(s, LocalShard)]
    if not remote:
        return {}
    ranges = [r for s in remote for r in requests(wanted[s.name])]
    whole = sum(s.nbytes for s in remote)
    largest = sorted((s.nbytes for s in remote), reverse=True)
    at_once = sum(largest[:SHARDS_ON_DISK])
    if max_disk_nbytes is not None:
        at_once = min(at_once, max_disk_nbytes)
    by_way = {
        Fetch.DOWNLOAD: Transfer(whole, len(remote), at_once),
        Fetch.CACHE: Transfer(whole, len(remote), whole),
    }
    if all(s.is_ranged for s in remote):
        by_way = {Fetch.RANGE: Transfer(sum(stop - start for start, stop in ranges), len(ranges), 0), **by_way}
    return by_way


def fetched_nbytes(
    shards: Sequence[Shard], wanted: Mapping[str, Sequence[Extent]], fetches: Mapping[str, Fetch | None]
) -> int:
    """Bytes that come over the network when each shard is read in its way."""
    total = 0
    for shard in shards:
        way, extents = fetches.get(shard.name, None), wanted.get(shard.name, ())
        if way is Fetch.RANGE:
            total += sum(stop - start for start, stop in requests(extents))
        elif way is not None and extents:
            total += shard.nbytes
    return total


def ahead_nbytes(extents: Sequence[Extent]) -> int:
    """Memory that matrices fetched by range take until they are computed, at most."""
    sizes = [stop - start for start, stop in set(extents)]
    # A request may begin some small matrices at once, beside the one that it ends.
    return min(sum(sizes), max(AHEAD_NBYTES, max(sizes, default=0)) + _REQUEST_NBYTES)
