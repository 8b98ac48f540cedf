from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.checkpoint import LocalShard, Shard
from spectrum_stream.errors import UsageError
from spectrum_stream.streaming.fetch import (
    Extent,
    Fetch,
    Transfer,
    choose_fetches,
    count_fetched_nbytes,
    estimate_transfers,
    limit_ahead_nbytes,
    plan_requests,
)

from ..support.hub_server import Fabricated
from ..support.remote_shard import Remote

MB = 1 << 20


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Draw the extents of wanted tensors, in order, with gaps between some of them."""
    found, position = [], draw(st.integers(0, 1000))
    for _ in range(draw(st.integers(1, 30))):
        position += draw(st.sampled_from([0, 0, 1, 100, 5000, 10**6]))
        size = draw(st.sampled_from([1, 64, 5000, 10**6, 40 * MB, 70 * MB]))
        found.append((position, position + size))
        position += size
    return found


@given(extents())
def test_plan_requests_covers_extents_once_with_little_waste(wanted: list[Extent]) -> None:
    asked = plan_requests(wanted)
    assert all(start < stop <= start + 32 * MB for start, stop in asked)
    assert all(before[1] <= after[0] for before, after in pairwise(asked))
    needed = sum(stop - start for start, stop in wanted)
    assert needed <= sum(stop - start for start, stop in asked) <= 1.01 * needed
    for start, stop in wanted:
        overlaps = [(max(start, a), min(stop, b)) for a, b in asked if a < stop and start < b]
        assert sum(b - a for a, b in overlaps) == stop - start


@given(extents())
def test_plan_requests_ignores_order_and_repetition(wanted: list[Extent]) -> None:
    assert plan_requests([*reversed(wanted), *wanted]) == plan_requests(wanted)


def test_plan_requests_bridges_small_gaps_only() -> None:
    assert plan_requests([(0, MB), (MB, 2 * MB)]) == [(0, 2 * MB)]
    assert plan_requests([(0, MB), (MB + 100, 2 * MB)]) == [(0, 2 * MB)]
    assert plan_requests([(0, MB), (2 * MB, 3 * MB)]) == [(0, MB), (2 * MB, 3 * MB)]
    assert plan_requests([]) == []


def shard(nbytes: int, ranged: bool = True, name: str = "a") -> Shard:
    return Remote(name, Fabricated({"a.weight": (nbytes // 2,)}), ranged)


WHOLE = {"a": [(0, 10 * MB)]}
PART = {"a": [(0, 2 * MB)]}


@pytest.mark.parametrize(
    ("wanted", "ranged", "fetch", "chosen"),
    [
        (PART, True, Fetch.AUTO, Fetch.RANGE),
        (WHOLE, True, Fetch.AUTO, Fetch.DOWNLOAD),
        (PART, False, Fetch.AUTO, Fetch.DOWNLOAD),
        (WHOLE, True, Fetch.RANGE, Fetch.RANGE),
        (PART, False, Fetch.RANGE, Fetch.DOWNLOAD),
        (PART, True, Fetch.DOWNLOAD, Fetch.DOWNLOAD),
        (PART, True, Fetch.CACHE, Fetch.CACHE),
    ],
)
def test_choose_fetches_by_share_and_server(
    wanted: dict[str, list[Extent]], ranged: bool, fetch: Fetch, chosen: Fetch
) -> None:
    assert choose_fetches([shard(10 * MB, ranged)], wanted, fetch, 10**12, None) == {"a": chosen}


def test_choose_fetches_maps_local_shards_and_skips_unwanted_ones() -> None:
    here = LocalShard(name="b", path=Path("/b"), where="b", nbytes=10, mtime_ns=0, inode=0)
    fetches = choose_fetches([shard(10 * MB), here], {"b": [(0, 10)]}, Fetch.CACHE, 10**12, None)
    assert fetches == {"b": None}
    assert estimate_transfers([here], {"b": [(0, 10)]}) == {}
    assert count_fetched_nbytes([here], {"b": [(0, 10)]}, fetches) == 0


@pytest.mark.parametrize(("free", "limit"), [(MB, None), (10**12, MB)])
def test_choose_fetches_with_little_disk_uses_ranges_or_fails(free: int, limit: int | None) -> None:
    assert choose_fetches([shard(10 * MB)], WHOLE, Fetch.AUTO, free, limit) == {"a": Fetch.RANGE}
    for ranged, fetch in ((False, Fetch.AUTO), (True, Fetch.DOWNLOAD), (True, Fetch.CACHE)):
        big = shard(10 * MB, ranged)
        with pytest.raises(UsageError) as error:
            choose_fetches([big], WHOLE, fetch, free, limit)
        assert error.value.reason == "too_little_disk"
        assert str(big.nbytes) in str(error.value)


def test_estimate_transfers_counts_bytes_requests_and_disk() -> None:
    shards = [shard(100 * MB, name=name) for name in "abc"]
    wanted = {name: [(1000, 1000 + 40 * MB)] for name in "abc"}
    size = shards[0].nbytes
    assert estimate_transfers(shards, wanted) == {
        Fetch.RANGE: Transfer(120 * MB, 6, 0),
        Fetch.DOWNLOAD: Transfer(3 * size, 3, 2 * size),
        Fetch.CACHE: Transfer(3 * size, 3, 3 * size),
    }
    assert (
        count_fetched_nbytes(shards, wanted, {"a": Fetch.RANGE, "b": Fetch.DOWNLOAD, "c": Fetch.CACHE})
        == 40 * MB + 2 * size
    )


def test_limit_ahead_nbytes_holds_the_largest_matrix() -> None:
    assert limit_ahead_nbytes([(0, 10), (10, 30)]) == 30
    assert limit_ahead_nbytes([(i * 100 * MB, (i + 1) * 100 * MB) for i in range(20)]) == 256_000_000 + 32 * MB
    assert limit_ahead_nbytes([(0, 2000 * MB), (2000 * MB, 2001 * MB)]) == 2001 * MB
    assert limit_ahead_nbytes([]) == 0
