"""Matrices of a remote shard that is downloaded whole, and then deleted or kept in the user's cache."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..checkpoint import RemoteShard
from ..errors import SourceError
from ..model.matrix import Matrix
from ..text import si_bytes
from .bounded import Budgets
from .decode import Read
from .mapped import read_mapped
from .parts import PartReader


def read_downloaded(
    shard: RemoteShard,
    matrices: Sequence[Matrix],
    parts: PartReader,
    *,
    folder: Path,
    budgets: Budgets,
    on_bytes: Callable[[int], object],
) -> Iterator[Read]:
    """Download a shard, yield views of its map, and delete it after use.

    Args:
        matrices: the matrices of this shard, in the order of their bytes.
        folder: the folder for the shard; made if it is missing.

    Raises:
        Closed; SourceError: disk_full; as `RemoteShard.download` and `read_mapped`.
    """
    budgets.shards.take(1)
    budgets.disk.take(shard.nbytes)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < shard.nbytes:
        raise SourceError(
            f"{shard.where} needs {si_bytes(shard.nbytes)} of disk, but only {si_bytes(free)} are free",
            reason="disk_full",
            hint="use --fetch range, which needs no disk" if shard.is_ranged else None,
        )
    local = shard.download(folder, on_bytes)
    left = len(matrices)

    def release() -> None:
        nonlocal left
        left -= 1
        if not left:
            # Windows cannot delete a mapped file. It is deleted with its folder at the end of the scan.
            with contextlib.suppress(PermissionError):
                local.path.unlink(missing_ok=True)
            budgets.disk.give(shard.nbytes)
            budgets.shards.give(1)

    parts.replace_shard(local)
    yield from read_mapped(local, matrices, parts, release=release)


def read_cached(
    shard: RemoteShard, matrices: Sequence[Matrix], parts: PartReader, *, on_bytes: Callable[[int], object]
) -> Iterator[Read]:
    """Download a shard into the user's Hugging Face cache, and yield views of its map.

    Raises:
        SourceError: as `RemoteShard.download`; as `read_mapped`.
    """
    local = shard.download(None, on_bytes)
    parts.replace_shard(local)
    yield from read_mapped(local, matrices, parts)
