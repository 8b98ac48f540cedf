"""Matrices of a remote shard that is downloaded whole, and then deleted or kept in the user's cache.

.snr_results_{slug}.shards/              the folder of temporary shards, which is deleted at the end of a scan
.snr_results_{slug}.shards/CACHEDIR.TAG  marks it as ours; a folder without this file is neither used nor emptied
.snr_results_{slug}.shards/{random}/     a new folder for each shard, so that it contains no link
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..checkpoint import RemoteShard
from ..errors import FileError, SourceError
from ..files import open_regular
from ..model.matrix import Matrix
from ..text import si_bytes
from .bounded import Budgets
from .decode import Read
from .mapped import read_mapped
from .parts import PartReader

_MARKER = "CACHEDIR.TAG"
# Programs that make backups know the first line (https://bford.info/cachedir/).
_MARKER_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# This folder holds temporary shards of spectrum_stream, which deletes it at the end of a scan.
"""


def make_folder(folder: Path) -> None:
    """Make the folder of temporary shards, with its marker, unless it exists.

    Raises:
        SourceError: not_our_folder, a link or something else has its name. OSError.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder):
            if _is_ours(folder):
                return
            # A killed process may have left it empty. A link or a folder with files cannot be removed in this way.
            folder.rmdir()
        folder.mkdir(mode=0o700)
    except OSError as error:
        if not os.path.lexists(folder):
            raise
        raise SourceError(
            f"{folder} is for temporary shards, but this program did not make it",
            reason="not_our_folder",
            hint="move it away, or use --fetch range",
        ) from error
    with (folder / _MARKER).open("xb") as file:
        file.write(_MARKER_TEXT)


def remove_folder(folder: Path) -> None:
    """Delete the folder of temporary shards if it is ours. Links are not followed."""
    if not _is_ours(folder):
        return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name == _MARKER:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                # Windows cannot delete a mapped file. The next scan does.
                with contextlib.suppress(OSError):
                    path.unlink()
        # The marker goes last, or a folder that is deleted in part would not be ours any more.
        if [path.name for path in folder.iterdir()] == [_MARKER]:
            (folder / _MARKER).unlink()
            folder.rmdir()


def _is_ours(folder: Path) -> bool:
    try:
        marker = folder / _MARKER
        if not stat.S_ISDIR(folder.lstat().st_mode) or not stat.S_ISREG(marker.lstat().st_mode):
            return False
        with open_regular(marker) as file:
            return file.read(len(_MARKER_TEXT) + 1) == _MARKER_TEXT
    except (OSError, FileError):
        return False


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
        Closed; SourceError: disk_full, not_our_folder; as `RemoteShard.download` and `read_mapped`.
    """
    budgets.shards.take(1)
    budgets.disk.take(shard.nbytes)
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < shard.nbytes:
        raise SourceError(
            f"{shard.where} needs {si_bytes(shard.nbytes)} of disk, but only {si_bytes(free)} are free",
            reason="disk_full",
            hint="use --fetch range, which needs no disk" if shard.is_ranged else None,
        )
    inside = Path(tempfile.mkdtemp(dir=folder))
    local = shard.download(inside, on_bytes)
    if not local.path.resolve().is_relative_to(folder.resolve()) or local.path.is_symlink() or not _is_ours(folder):
        raise SourceError(f"{folder} was replaced during the download", reason="not_our_folder")
    left = len(matrices)

    def release() -> None:
        nonlocal left
        left -= 1
        if not left:
            # Windows cannot delete a mapped file. It is deleted with its folder at the end of the scan.
            shutil.rmtree(inside, ignore_errors=True)
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
