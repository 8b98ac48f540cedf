"""Matrices of a shard on this machine, through its memory map."""

import contextlib
from collections.abc import Iterator, Sequence

from ..checkpoint import LocalShard
from ..model.matrix import Matrix
from ..model.no_score import NoScore
from .bounded import Budget
from .decode import Read, Release, ShardReader, without_memory
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
    # The views outlive the reader: a tensor keeps its map.
    with contextlib.ExitStack() as opened:
        reader = None
        # Without memory to map the shard, or for the buffer, none of its matrices is read.
        with without_memory():
            scratch = memoryview(bytearray(_READ_NBYTES))
            reader = opened.enter_context(ShardReader(shard))
        for matrix in matrices:
            if ahead is not None:
                ahead.take(matrix.nbytes)
            read: Read = matrix, NoScore.NO_MEMORY, release
            with without_memory():
                if reader is not None:
                    reader.warm(matrix.start, matrix.nbytes, scratch)
                    read = parts.attach(matrix, reader.read(matrix), release)
            yield read
            # This name would keep the tensor alive.
            del read
