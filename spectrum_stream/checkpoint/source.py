"""A checkpoint that was found: its source, and its shards on this machine or on a server."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import FileError
from ..files import open_regular
from ..text import listed

# The first read of a shard. Many headers are smaller: their median in published shards is 100 kB.
PROBE_NBYTES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShard:
    """A shard in a file system.

    During a scan, size, mtime and inode identify its content.

    Attributes:
        name: its path below the checkpoint, with forward slashes.
        path: absolute, because the working folder can change after the plan.
        where: its name in messages, the path as it was given.
        inode: a file that replaces it has another inode.
    """

    name: str
    path: Path
    where: str = field(compare=False)
    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def at(cls, name: str, path: Path) -> "LocalShard":
        """Describe the current state of the shard at a path.

        Raises:
            OSError.
        """
        status = path.stat()
        return cls(
            name=name,
            path=path.absolute(),
            where=str(path),
            nbytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
        )

    def is_unchanged(self) -> bool:
        """Whether the file is unchanged since it was described."""
        try:
            return self == LocalShard.at(self.name, self.path)
        except OSError:
            return False

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop) of the file; fewer at its end.

        Raises:
            FileError: not_a_file, unreadable.
        """
        try:
            with open_regular(self.path) as file:
                file.seek(start)
                return file.read(stop - start) or b""
        except OSError as error:
            raise FileError(f"{self.where} cannot be read: {error.strerror}", reason="unreadable") from error


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
        """Whether the server answers a request for a byte range with that range."""

    @property
    def where(self) -> str:
        """Its name in messages."""

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop); fewer at the end of the file.

        Meant for headers: it may fetch everything before them.

        Raises:
            SourceError; CheckpointError: changed.
        """

    def stream(
        self, start: int, stop: int, write: Callable[[int, bytes], object], halt: threading.Event | None = None
    ) -> None:
        """Pass bytes [start, stop) to `write(position, chunk)`, each once and in order.

        Args:
            halt: set it to stop the transfer soon.

        Raises:
            RangesIgnored; Halted; SourceError; CheckpointError: changed.
        """

    def download(self, folder: Path | None, on_bytes: Callable[[int], object]) -> LocalShard:
        """Download the whole shard.

        Args:
            folder: where to; None for the user's Hugging Face cache.
            on_bytes: called with the number of bytes that came since the last call.

        Raises:
            SourceError; CheckpointError: changed.
        """


Shard = LocalShard | RemoteShard


class RangesIgnored(Exception):
    """The server answers a request for a range with the whole file."""


class Halted(Exception):
    """The transfer was stopped through its `halt` event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that was found.

    Attributes:
        model: MODEL as it was typed.
        name: its name in file names: a path as typed, a repo by its id.
        where: the folder, file or repo, in full. Two models with equal file names differ in it.
        commit: the commit of a repo; every request is for this commit. None for a path.
        shards: the files to read, in the order of their names.
        weight_map: tensor name to shard name, from the index; None without one.
        config: config.json, or {}. If it lacks the quantization, that of `quantize_config.json` is added.
        quantization_files: `quantize_config.json` and others of its kind, by their names.
        is_part: whether this is one shard of several, so that the config describes more than it holds.
        adapter_config: adapter_config.json; None without one.
        ignored: other safetensors files that lie beside the shards.
        unlisted: the ignored files that belong to the shards by their numbers, and that the index does not list.
        other_index: an index that lists another copy of the weights, as it can be given for MODEL; None without one.
        warnings: one sentence for each oddity, and for what was ignored.
    """

    model: str
    name: str
    where: str
    commit: str | None
    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str] | None
    config: Mapping[str, Any]
    quantization_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_part: bool = False
    adapter_config: Mapping[str, Any] | None = None
    ignored: tuple[str, ...] = ()
    unlisted: tuple[Shard, ...] = ()
    other_index: str | None = None
    warnings: tuple[str, ...]

    @property
    def other_copy(self) -> str | None:
        """How to read another copy of the weights, as a hint; None if there is none."""
        if self.other_index is not None:
            return f"give {self.other_index} to read the shards that it lists"
        return f"the weights may be in {listed(self.ignored)}, beside it" if self.ignored else None

    def __str__(self) -> str:
        return self.where if self.commit is None else f"{self.where}@{self.commit}"
