"""The tensors that are needed to read a quantized weight: its scales, zero points and column order."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from math import prod
from typing import NamedTuple

from ...checkpoint import LocalShard
from ...checkpoint.header import TensorInfo
from ...checkpoint.tensors import Checkpoint
from ..names import WEIGHT_SUFFIX, is_weight, module_of
from ..no_score import NoScore
from ..quantization import Part, Unreadable

FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
# These dtypes store a power of two as its exponent plus 127.
EXPONENT_DTYPES = ("U8", "F8_E8M0")
INDEX_DTYPES = ("I32", "I64")
WORD_BITS = 32
_MARKER = re.compile(r"quant|scaled|fp8|fp4|nf4|int8|int4")
# A marker has at most this many elements.
_LARGEST_MARKER = 64

MISSING_SCALES = Unreadable(NoScore.MISSING_SCALES)


class Companion(NamedTuple):
    """One of these tensors, and the name of its shard."""

    shard: str
    info: TensorInfo

    def part(
        self,
        role: str,
        shape: tuple[int, ...] | None = None,
        expert: tuple[int, int] = (0, 1),
        *,
        dtype: str | None = None,
    ) -> Part:
        """Describe the tensor as a part of a weight.

        Args:
            shape: the shape of the values to read; default: the shape of the tensor.
            expert: (index, count), to take the part of one expert.
            dtype: the dtype of the values, if the tensor has bytes of another.
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
            dtype=dtype or info.dtype,
            shape=shape,
        )

    def misfit(self, shape: tuple[int, ...]) -> Unreadable:
        """Report that the tensor does not fit a weight of this shape."""
        name, info = self.info.name.rpartition(".")[2], self.info
        weight = " x ".join(map(str, shape))
        return Unreadable(NoScore.BAD_SCALES, f"{name} of {info.dtype}{list(info.shape)} for a weight of {weight}")


class Companions:
    """All tensors of a checkpoint by name, from every shard, with the metadata of the shards.

    Args:
        values: the endings of tensors with quantized values, and the endings of their parameters.
        top_tensors: the names of tensors at the top that are not markers.

    Attributes:
        metadata: (key, value) of all shards, without repetitions.
        markers: the small tensors that belong to the checkpoint or to a part of it, such as `scaled_fp8`.
    """

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, str], top_tensors: Collection[str]) -> None:
        self._tensors = {tensor.name: Companion(shard.name, tensor) for shard, tensor in checkpoint.tensors}
        self._shards = {shard.name: shard for shard in checkpoint.source.shards}
        self._metadata = checkpoint.metadata
        self._names = sorted(self._tensors)
        # Most checkpoints have none of these endings, or those of one format.
        packed = [name for name in self._names if name.endswith(tuple(values))]
        self._values = {end: instead for end, instead in values.items() if any(n.endswith(end) for n in packed)}
        entries = (entry for metadata in checkpoint.metadata.values() for entry in metadata.items())
        self.metadata = tuple(dict.fromkeys(entries))
        self.markers = tuple(
            name
            for name, tensor in self._tensors.items()
            if prod(tensor.info.shape) <= _LARGEST_MARKER and self._is_marker(name) and name not in top_tensors
        )

    def get(self, *names: str) -> Companion | None:
        """Return the first of these tensors that exists."""
        for name in names:
            if (found := self._tensors.get(name)) is not None:
                return found
        return None

    @cached_property
    def has_scaled_float8(self) -> bool:
        """Whether any float8 weight has scales beside it, by their names."""
        owners = {module_of(name) for name, tensor in self._tensors.items() if tensor.info.dtype.startswith("F8_E")}
        # The name of scales begins with the module, or with a bare parameter: `X.weight_scale`, `X_scale`.
        names = (name for name in self._names if "scal" in name.rpartition(".")[2])
        return any(name.rpartition(sign)[0] in owners for name in names for sign in "._")

    def metadata_of(self, tensor: str) -> Mapping[str, str]:
        """Return the metadata of the shard that holds a tensor."""
        return self._metadata[self._tensors[tensor].shard]

    def parameter_of(self, tensor: str) -> str:
        """Return the name of the weight that a tensor stores: `X.weight` for `X.qweight`."""
        return parameter_of(tensor, self._values)

    def twin_of(self, tensor: str) -> str | None:
        """Return another tensor that stores the same weight, if any."""
        if not self._values:
            return None
        parameter = self.parameter_of(tensor)
        owner = module_of(parameter)
        names = (parameter, *(f"{owner}{ending}" for ending in self._values))
        return next(
            (n for n in names if n != tensor and self._holds_values(n) and self.parameter_of(n) == parameter), None
        )

    def beside(self, tensor: str) -> Iterator[tuple[str, str]]:
        """Find the other tensors of a module or a bare parameter.

        Returns:
            (name, ending): the ending follows the name of the module or of the parameter. Tensors with the values of
            the same weight are left out.
        """
        parameter = self.parameter_of(tensor)
        owner = module_of(parameter)
        for separator in "." if is_weight(parameter) else "_.:":
            start = f"{owner}{separator}"
            for i in range(bisect_left(self._names, start), len(self._names)):
                name = self._names[i]
                if not name.startswith(start):
                    break
                if name != tensor and self.parameter_of(name) != parameter:
                    yield name, name.removeprefix(owner)

    def _is_marker(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if not owner:
            return True
        # Elsewhere only such a word tells it from a small parameter. The tensors beside a weight are no markers.
        endings = (WEIGHT_SUFFIX, *self._values)
        return _MARKER.search(last) is not None and not any(f"{owner}{ending}" in self._tensors for ending in endings)

    def _holds_values(self, name: str) -> bool:
        return name in self._tensors and 0 not in self._tensors[name].info.shape

    def local_bytes(self, companion: Companion) -> bytes | None:
        """Read a tensor from a local shard.

        Return None for a remote shard, which would need a request.
        """
        shard, info = self._shards[companion.shard], companion.info
        return shard.read(info.start, info.start + info.nbytes) if isinstance(shard, LocalShard) else None


def parameter_of(tensor: str, values: Mapping[str, str]) -> str:
    """Return the name of the weight that a tensor stores.

    Args:
        values: the endings of tensors with quantized values, and the endings of their parameters.
    """
    # Most names have none of the endings, which one test shows.
    if tensor.endswith(tuple(values)):
        for ending, instead in values.items():
            if tensor.endswith(ending):
                return tensor.removesuffix(ending) + instead
    return tensor
