"""Stored bytes to matrices: one tensor at a time, through safetensors' memory map.

A matrix comes back in its stored dtype and is a view of the map: it takes no memory of its own until a
block of it is upcast. Its pages belong to the file and the system may drop them at any time.
"""

from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .source import Shard


class ShardReader:
    """An open shard; use it as a context manager."""

    def __init__(self, shard: Shard) -> None:
        """
        Raises:
            CheckpointError: unreadable, the file is gone or is not what its header said a moment ago.
        """
        self.shard = shard
        try:
            self._file: Any = safe_open(shard.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard.path} cannot be opened: {error}", reason="unreadable") from error

    def matrix(self, tensor: str) -> torch.Tensor:
        """The tensor as an (n, m) matrix in its stored dtype, a view of the file; a vector is (1, k)."""
        stored: torch.Tensor = self._file.get_tensor(tensor)
        return stored.unsqueeze(0) if stored.ndim == 1 else stored

    def __enter__(self) -> "ShardReader":
        self._file.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
