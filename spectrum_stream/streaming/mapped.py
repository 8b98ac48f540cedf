"""Matrices of a shard on this machine, through its memory map."""

from collections.abc import Iterator, Sequence

from ..checkpoint import LocalShard
from ..model.matrix import Matrix
from .bounded import Budget
from .decode import Read, Release, ShardReader
from .parts import PartReader

_READ_NBYTES = 4 << 20


def read_mapped(
    shard: LocalShard,
    matrices: Sequence[Matrix],
    parts: PartReader,
    *,
    ahead: Budget | None = None,
    release: Release = lambda: None,
) -> Iterator[Read]:
    """Prefetch matrices into the page cache, and yield views of the map.

    Args:
        matrices: the matrices of this shard, in the order of their bytes.
        ahead: bytes are taken from it before a matrix is read. A map takes no private memory, so the consumer gives
            them back as soon as it has the matrix.
        release: called when a matrix is computed.

    Raises:
        Closed; CheckpointError: unreadable, changed; as `PartReader.attach`.
    """
    scratch = memoryview(bytearray(_READ_NBYTES))
    # The views outlive the reader: a tensor keeps its map.
    with ShardReader(shard) as reader:
        for matrix in matrices:
            if ahead is not None:
                ahead.take(matrix.nbytes)
            reader.warm(matrix.start, matrix.nbytes, scratch)
            yield parts.attach(matrix, reader.read(matrix), release)
