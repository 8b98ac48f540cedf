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
    ahead_nbytes,
    choose_fetches,
    fetched_nbytes,
    requests,
    transfers,
)

from ..support.hub_server import Fabricated
from ..support.remote_shard import Remote

MB = 1 << 20


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Tensors that are wanted, in order, with gaps between some of them."""
    found, position = [], draw(st.integers(0, 1000))
    for _ in range(draw(st.integers(1, 30))):
        position += draw(st.sampled_from([0, 0, 1, 100, 5000, 10**6]))
        size = draw(st.sampled_from([1, 64, 5000, 10**6, 40 * MB, 70 * MB]))
        found.append((position, position + size))
        position += size
    return found


@given(extents())
def test_requests_cover_what_is_wanted_once_and_little_else(wanted: list[Extent]) -> None:
    asked = requests(wanted)
    assert all(start < stop <= start + 32 * MB for start, stop in asked)
    assert all(before[1] <= after[0] for before, after in pairwise(asked))
    needed = sum(stop - start for start, stop in wanted)
    assert needed <= sum(stop - start for start, stop in asked) <= 1.01 * needed
    for start, stop in wanted:
        overlaps = [(max(start, a), min(stop, b)) for a, b in asked if a < stop and start < b]
        assert sum(b - a for a, b in overlaps) == stop - start


@given(extents())
def test_order_and_repetition_of_what_is_wanted_do_not_matter(wanted: list[Extent]) -> None:
    assert requests([*reversed(wanted), *wanted]) == requests(wanted)


def test_neighbors_are_one_request_and_a_wide_gap_parts_them() -> None:
    assert requests([(0, MB), (MB, 2 * MB)]) == [(0, 2 * MB)]
    assert requests([(0, MB), (MB + 100, 2 * MB)]) == [(0, 2 * MB)]
    assert requests([(0, MB), (2 * MB, 3 * MB)]) == [(0, MB), (2 * MB, 3 * MB)]
    assert requests([]) == []


def shard(nbytes: int, ranged: bool = True, name: str = "a") -> Shard:
    return Remote(name, Fabricated({"a.weight": (nbytes // 2,)}), ranged)


WHOLE = {"a": [(0, 10 * MB)]}
PART = {"a": [(0, 2 * MB)]}


@pytest.mark.parametrize(
    ("wanted", "ranged", "fetch", "way"),
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
def test_the_way_follows_what_is_wanted_and_what_the_server_can_do(
    wanted: dict[str, list[Extent]], ranged: bool, fetch: Fetch, way: Fetch
) -> None:
    assert choose_fetches([shard(10 * MB, ranged)], wanted, fetch, 10**12, None) == {"a": way}


def test_what_is_here_is_mapped_and_what_is_not_wanted_is_left_out() -> None:
    here = LocalShard("b", Path("b"), 10, 0, 0)
    fetches = choose_fetches([shard(10 * MB), here], {"b": [(0, 10)]}, Fetch.CACHE, 10**12, None)
    assert fetches == {"b": None} and transfers([here], {"b": [(0, 10)]}) == {}
    assert fetched_nbytes([here], {"b": [(0, 10)]}, fetches) == 0


@pytest.mark.parametrize(("free", "limit"), [(MB, None), (10**12, MB)])
def test_too_little_disk_means_ranges_or_a_refusal_with_the_number(free: int, limit: int | None) -> None:
    assert choose_fetches([shard(10 * MB)], WHOLE, Fetch.AUTO, free, limit) == {"a": Fetch.RANGE}
    for ranged, fetch in ((False, Fetch.AUTO), (True, Fetch.DOWNLOAD), (True, Fetch.CACHE)):
        big = shard(10 * MB, ranged)
        with pytest.raises(UsageError) as error:
            choose_fetches([big], WHOLE, fetch, free, limit)
        assert error.value.reason == "too_little_disk" and str(big.nbytes) in str(error.value)


def test_what_each_way_takes() -> None:
    shards = [shard(100 * MB, name=name) for name in "abc"]
    wanted = {name: [(1000, 1000 + 40 * MB)] for name in "abc"}
    size = shards[0].nbytes
    assert transfers(shards, wanted) == {
        Fetch.RANGE: Transfer(120 * MB, 6, 0),
        Fetch.DOWNLOAD: Transfer(3 * size, 3, 2 * size),
        Fetch.CACHE: Transfer(3 * size, 3, 3 * size),
    }
    assert (
        fetched_nbytes(shards, wanted, {"a": Fetch.RANGE, "b": Fetch.DOWNLOAD, "c": Fetch.CACHE})
        == 40 * MB + 2 * size
    )


def test_memory_for_ranges_is_bounded_but_holds_the_largest_matrix() -> None:
    assert ahead_nbytes([(0, 10), (10, 30)]) == 30
    assert ahead_nbytes([(i * 100 * MB, (i + 1) * 100 * MB) for i in range(20)]) == 256_000_000 + 32 * MB
    assert ahead_nbytes([(0, 2000 * MB), (2000 * MB, 2001 * MB)]) == 2001 * MB
    assert ahead_nbytes([]) == 0
