"""The scales and zero points of quantized matrices, which are separate tensors."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint import LocalShard, Shard
from ..errors import CheckpointError
from ..model.matrix import Matrix
from ..model.quantization import Part
from ..numerics.dequantize import Packed
from .bounded import Budget
from .decode import Read, Release, without_memory
from .fetch import plan_requests

if TYPE_CHECKING:
    import torch

# Parts are read for several matrices at once, up to this many bytes, or for one matrix.
_BATCH_NBYTES = 8 << 20


class PartReader:
    """Reads the parts of quantized matrices in order, a few megabytes at a time.

    Args:
        shards: the shards by name; a part may be in another shard than its matrix.
        matrices: the matrices to read, in order; those that are not quantized are ignored.
        budget: the memory for parts.
        on_bytes: called with the number of bytes that came over the network.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        matrices: Sequence[Matrix],
        budget: Budget,
        on_bytes: Callable[[int], object],
    ) -> None:
        self._shards = dict(shards)
        self._budget = budget
        self._on_bytes = on_bytes
        self._left = deque((w.key, w.quantization.parts) for w in matrices if w.quantization is not None)
        self._read: dict[str, dict[str, bytes]] = {}

    def replace_shard(self, shard: LocalShard) -> None:
        """Read a shard from its download from now on."""
        self._shards[shard.name] = shard

    def attach(self, matrix: Matrix, stored: "torch.Tensor", release: Release) -> Read:
        """Return the matrix with its parts, if it is quantized.

        This waits for room in the budget.

        Raises:
            Closed; SourceError; CheckpointError: changed; MemoryError or other errors, if memory is short.
        """
        quantization = matrix.quantization
        if quantization is None:
            return matrix, stored, release
        # Unlike the matrix, which may be mapped, its scales are always in private memory.
        self._budget.take(quantization.parts_nbytes)

        def release_both() -> None:
            self._budget.give(quantization.parts_nbytes)
            release()

        try:
            if matrix.key not in self._read:
                # The parts of the last batch are released.
                self._read = {}
                with without_memory():
                    self._read = self._read_batch(matrix.key, _BATCH_NBYTES)
            if matrix.key not in self._read:
                self._read = self._read_batch(matrix.key, 0)
            return matrix, Packed(stored, quantization, self._read[matrix.key]), release_both
        except BaseException:
            self._budget.give(quantization.parts_nbytes)
            raise

    def _read_batch(self, key: str, limit: int) -> dict[str, dict[str, bytes]]:
        """Read the parts of a matrix, and of the next ones up to a limit of bytes.

        Returns:
            the bytes by matrix key and role.
        """
        # A matrix that does not fit into memory was left out.
        while self._left[0][0] != key:
            self._left.popleft()
        batch: list[tuple[str, Part]] = []
        # A weight that needs no other tensor has no parts.
        found: dict[str, dict[str, bytes]] = {}
        nbytes = 0
        for key, parts in self._left:
            if found and nbytes + sum(part.nbytes for part in parts) > limit:
                break
            found[key] = {}
            batch += [(key, part) for part in parts]
            nbytes += sum(part.nbytes for part in parts)
        for name in sorted({part.shard for _, part in batch}):
            shard = self._shards[name]
            wanted = [(key, part) for key, part in batch if part.shard == name]
            extents = plan_requests([(p.start, p.start + p.nbytes) for _, p in wanted])
            chunks = [(start, shard.read(start, stop)) for start, stop in extents]
            if not isinstance(shard, LocalShard):
                self._on_bytes(sum(len(body) for _, body in chunks))
            for key, part in wanted:
                body = _cut(chunks, part.start, part.start + part.nbytes)
                if len(body) != part.nbytes:
                    raise CheckpointError(f"{shard.where} was cut after it was planned", reason="changed")
                found[key][part.role] = body
        for _ in found:
            self._left.popleft()
        return found


def _cut(chunks: Sequence[tuple[int, bytes]], start: int, stop: int) -> bytes:
    """Return bytes [start, stop) from chunks with their first positions."""
    return b"".join(
        body[max(start - position, 0) : stop - position]
        for position, body in chunks
        if position < stop and start < position + len(body)
    )
