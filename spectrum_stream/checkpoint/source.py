"""Which files make a checkpoint, wherever they are: the index, and the rules for its names.

What an index says about files is checked here, before a name from it touches a path or an address.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import SourceError


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A shard in a file system. Size, mtime and inode identify its content for as long as a scan lasts.

    Attributes:
        name: its path below the checkpoint, with forward slashes.
        inode: another file of the same name has another one.
    """

    name: str
    path: Path
    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def at(cls, name: str, path: Path) -> "LocalShard":
        """The shard at a path, as it is now. Raises OSError."""
        status = path.stat()
        return cls(name, path, status.st_size, status.st_mtime_ns, status.st_ino)

    def is_unchanged(self) -> bool:
        """Whether it is the file that it was."""
        try:
            return self == LocalShard.at(self.name, self.path)
        except OSError:
            return False

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.path)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file; fewer at its end.

        Raises:
            SourceError: unreadable.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}", reason="unreadable") from error


class RemoteShard(Protocol):
    """A shard on a server, at one commit."""

    @property
    def name(self) -> str:
        """Its path below the checkpoint, with forward slashes."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def is_ranged(self) -> bool:
        """Whether the server sends a part of it when asked for one."""

    @property
    def where(self) -> str:
        """What to call it in a message."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop); fewer at the end. For headers: it may fetch all that is before them."""

    def stream(
        self, start: int, stop: int, write: Callable[[int, bytes], object], halt: threading.Event | None = None
    ) -> None:
        """Hand bytes [start, stop) to `write(position, chunk)`, each once and in order.

        Args:
            halt: set it to have this stop soon.

        Raises:
            RangesIgnored; Halted; SourceError; CheckpointError: changed.
        """

    def download(self, folder: Path | None, on_bytes: Callable[[int], object]) -> LocalShard:
        """Download it whole, to `folder` or to the user's cache.

        Args:
            on_bytes: called with the number of bytes that came since the last call.

        Raises:
            SourceError; CheckpointError: changed.
        """


Shard = LocalShard | RemoteShard


class RangesIgnored(Exception):
    """The server answers a range with the whole file."""


class Halted(Exception):
    """Whoever wanted the bytes told the reading to stop."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, found.

    Attributes:
        model: MODEL as it was typed.
        name: what to call it in file names: a path as typed, a repo by its id.
        where: the folder, file or repo, in full; the true identity behind a slug.
        commit: the commit of a repo that all reads are of; None for a path.
        shards: the files to read, in the order of their names.
        weight_map: tensor name to shard name, from the index; None without one.
        config: config.json, or {}.
        warnings: what was ignored or odd, a sentence each.
    """

    model: str
    name: str
    where: str
    commit: str | None
    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str] | None
    config: Mapping[str, Any]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return self.where if self.commit is None else f"{self.where}@{self.commit}"
