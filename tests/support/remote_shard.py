"""A remote shard that gets no requests, for decisions that come before any request."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectrum_stream.checkpoint import LocalShard

from .hub_server import Blob


@dataclass(frozen=True)
class Remote:
    name: str
    blob: Blob
    is_ranged: bool

    @property
    def nbytes(self) -> int:
        return self.blob.nbytes

    @property
    def where(self) -> str:
        return self.name

    def read(self, start: int, stop: int) -> bytes:
        return self.blob.read(start, stop)

    def stream(
        self, start: int, stop: int, write: Callable[[int, bytes], object], halt: threading.Event | None = None
    ) -> None:
        raise AssertionError

    def download(self, folder: Path | None, on_bytes: Callable[[int], object]) -> LocalShard:
        raise AssertionError
