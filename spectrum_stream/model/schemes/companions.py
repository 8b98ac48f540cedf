"""The tensors that are needed to read a quantized weight: its scales, zero points and column order."""

from typing import NamedTuple

from ...checkpoint import LocalShard
from ...checkpoint.header import TensorInfo
from ...checkpoint.tensors import Checkpoint
from ..no_score import NoScore
from ..quantization import Part, Unreadable, is_companion

FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
# These dtypes store a power of two as its exponent plus 127.
EXPONENT_DTYPES = ("U8", "F8_E8M0")
INDEX_DTYPES = ("I32", "I64")
WORD_BITS = 32

MISSING_SCALES = Unreadable(NoScore.MISSING_SCALES)


class Companion(NamedTuple):
    """One of these tensors, and the name of its shard."""

    shard: str
    info: TensorInfo

    def part(self, role: str, shape: tuple[int, ...] | None = None, expert: tuple[int, int] = (0, 1)) -> Part:
        """Describe the tensor as a part of a weight.

        Args:
            shape: the shape of the values to read; default: the shape of the tensor.
            expert: (index, count), to take the part of one expert.
        """
        (index, count), info = expert, self.info
        nbytes = info.nbytes // count
        shape = info.shape if shape is None else shape
        return Part(
            role=role,
            tensor=info.name,
            shard=self.shard,
            start=info.start + index * nbytes,
            nbytes=nbytes,
            dtype=info.dtype,
            shape=shape,
        )

    def misfit(self, shape: tuple[int, ...]) -> Unreadable:
        """Report that the tensor does not fit a weight of this shape."""
        name, info = self.info.name.rpartition(".")[2], self.info
        weight = " x ".join(map(str, shape))
        return Unreadable(NoScore.BAD_SCALES, f"{name} of {info.dtype}{list(info.shape)} for a weight of {weight}")


class Companions:
    """All of these tensors of a checkpoint by name, from every shard."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = {
            tensor.name: Companion(shard.name, tensor)
            for shard, tensor in checkpoint.tensors
            if is_companion(tensor.name)
        }
        self._shards = {shard.name: shard for shard in checkpoint.source.shards}

    def get(self, *names: str) -> Companion | None:
        """Return the first of these tensors that exists."""
        return next((self._tensors[name] for name in names if name in self._tensors), None)

    def local_bytes(self, companion: Companion) -> bytes | None:
        """Read a tensor from a local shard.

        Return None for a remote shard, which would need a request.
        """
        shard, info = self._shards[companion.shard], companion.info
        return shard.read(info.start, info.start + info.nbytes) if isinstance(shard, LocalShard) else None
