"""The tensors that are needed to read a quantized weight: its scales, zero points and column order."""

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

from ...checkpoint import LocalShard
from ...checkpoint.header import TensorInfo
from ...checkpoint.tensors import Checkpoint
from ..names import WEIGHT_SUFFIX, is_weight, module_of
from ..no_score import NoScore
from ..quantization import Part, Unreadable

# These dtypes store a power of two as its exponent plus 127.
EXPONENT_DTYPES = ("U8", "F8_E8M0")
INDEX_DTYPES = ("I32", "I64")
WORD_BITS = 32
_MARKER = re.compile(r"quant|scaled|fp8|fp4|nf4|int8|int4")
# A marker has at most this many elements.
_LARGEST_MARKER = 64
# Tensors of a parent module that change the weights below it, and scales that change those of its own modules.
_TRANSFORM = re.compile(
    r"(?:^|[._])((?i:smooth\w*|pre_quant\w*|equaliz\w*|hadamard\w*|had_?k|rotat\w*|permut\w*)|R\d|act\.scales?)"
    r"(?:\.weight)?$"
)
_SCALE = re.compile(r"(?:^|[._])(scales?)$")
# PEFT's name for the module that an adapter wraps.
_BASE_LAYER = ".base_layer"
_MAX_SIGNS = 64

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
        is_harmless: whether a tensor of a parent module changes no weight, by its name.

    Attributes:
        metadata: (key, value) of all shards, without repetitions.
        components: the last components of all names.
        markers: the small tensors that belong to the checkpoint or to a part of it, such as `scaled_fp8`, and tensors
            of an adapter whose weight is not found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        values: Mapping[str, str],
        top_tensors: Collection[str],
        is_harmless: Callable[[str], bool],
    ) -> None:
        self._tensors = {tensor.name: Companion(shard.name, tensor) for shard, tensor in checkpoint.tensors}
        self._shards = {shard.name: shard for shard in checkpoint.source.shards}
        self._metadata = checkpoint.metadata
        self._names = sorted(self._tensors)
        self.components = frozenset([name[name.rfind(".") + 1 :] for name in self._names])
        # Most checkpoints have none of these endings, or those of one format.
        every = tuple(values)
        packed = [name for name in self._names if name.endswith(every)]
        self._values = {end: instead for end, instead in values.items() if any(n.endswith(end) for n in packed)}
        self._value_endings = tuple(self._values)
        entries = (entry for metadata in checkpoint.metadata.values() for entry in metadata.items())
        self.metadata = tuple(dict.fromkeys(entries))
        self._is_harmless = is_harmless
        self._transforms, self._scales = self._find_transforms()
        owners = [(name, self._find_adapted(name)) for name in checkpoint.adapter]
        # The first of each weight is enough.
        self._adapter = {owner: name for name, owner in reversed(owners) if owner is not None}
        words = frozenset(component for component in self.components if _MARKER.search(component))
        self.markers = (
            *(
                name
                for name, tensor in self._tensors.items()
                if self._is_marker(name, words)
                and prod(tensor.info.shape) <= _LARGEST_MARKER
                and name not in top_tensors
            ),
            *(name for name, owner in owners if owner is None),
        )

    def get(self, *names: str) -> Companion | None:
        """Return the first of these tensors that exists."""
        for name in names:
            if (found := self._tensors.get(name)) is not None:
                return found
        return None

    def find(self, owner: str, endings: Iterable[str]) -> Companion | None:
        """Return the first tensor with a given name and one of these endings."""
        for ending in endings:
            if (found := self._tensors.get(owner + ending)) is not None:
                return found
        return None

    def has(self, endings: tuple[str, ...]) -> bool:
        """Whether any name has one of these endings."""
        return any(name.endswith(endings) for name in self._names)

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
        return parameter_of(tensor, self._values) if tensor.endswith(self._value_endings) else tensor

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

    def siblings(self, tensor: str) -> Sequence[tuple[str, str]]:
        """Find the tensors `X_*` beside `X.weight` that are not parameters and belong to no other weight.

        Returns:
            (name, ending), as `beside` does.
        """
        owner = module_of(self.parameter_of(tensor))
        start = f"{owner}_"
        i = bisect_left(self._names, start)
        # Most modules have none. One look-up finds that.
        if i == len(self._names) or not self._names[i].startswith(start):
            return ()
        return self._siblings.get(owner, ())

    @cached_property
    def _siblings(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """The tensors `X_*` by the name X of the module that they belong to."""
        found: dict[str, list[tuple[str, str]]] = {}
        endings = ("weight", "bias", *self._values)
        for name in self._names:
            # Modules `X_y` and fused experts are not tensors of X.
            if name.find("_", name.rfind(".") + 1) < 0 or name.endswith(endings):
                continue
            if len(self._tensors[name].info.shape) > 2 or (owner := self._find_adapted(name)) is None:
                continue
            if name.startswith(f"{owner}_") and "." not in name[len(owner) :]:
                found.setdefault(owner, []).append((name, name.removeprefix(owner)))
        return found

    def transform_of(self, tensor: str) -> str | None:
        """Return a tensor of a parent module that changes the weight that a tensor stores, if any.

        Such as `P.smooth_scale` or `P.act.scales` for `P.X.weight`.
        """
        if not self._scales and not self._transforms:
            return None
        parent = module_of(self.parameter_of(tensor)).rpartition(".")[0]
        if (name := self._scales.get(parent)) is not None:
            return name
        while (name := self._transforms.get(parent)) is None and parent:
            parent = parent.rpartition(".")[0]
        return name

    def _find_transforms(self) -> tuple[dict[str, str], dict[str, str]]:
        """Find the tensors that change all weights below a module, and those of the module's own modules."""
        below: dict[str, str] = {}
        own: dict[str, str] = {}
        # The expressions match at most the last three components, and many layers have the same ones.
        seen: dict[str, tuple[int, bool] | None] = {}
        for name, tensor in self._tensors.items():
            tail = name[_find_tail(name) :]
            if tail not in seen:
                seen[tail] = _match_transform(tail)
            if (found := seen[tail]) is None:
                continue
            length, is_scale = found
            module = name.removesuffix(WEIGHT_SUFFIX)
            if self._is_harmless(name) or self._has_weight(module.rpartition(".")[0]):
                continue
            # A scale for a whole tensor, and one for each expert, are other things.
            if is_scale and (prod(tensor.info.shape) <= 1 or len(tensor.info.shape) > 2):
                continue
            if self._find_adapted(module) is None:
                parent = name[:-length].rpartition(".")[0]
                (own if is_scale and parent else below).setdefault(parent, name)
        return below, own

    def _has_weight(self, module: str) -> bool:
        return any(f"{module}{ending}" in self._tensors for ending in (WEIGHT_SUFFIX, *self._values))

    def adapter_of(self, tensor: str) -> str | None:
        """Return a tensor of an adapter that changes the weight that a tensor stores, if any.

        Such as the low-rank part of SVDQuant, `X.weight_quantizer._svdquant_lora_a`.
        """
        return self._adapter.get(module_of(self.parameter_of(tensor)).removesuffix(_BASE_LAYER))

    def _find_adapted(self, name: str) -> str | None:
        """Find the module or the bare parameter that a tensor of an adapter changes: the longest one in its name."""
        stop = len(name)
        # Names of models have few components and words. In a name with many, the last ones do not count.
        if name.count(".") + name.count("_") > _MAX_SIGNS:
            stop = [match.end() for match in re.finditer(r"[._]", name)][_MAX_SIGNS - 1]
        while (stop := max(name.rfind(".", 0, stop), name.rfind("_", 0, stop))) >= 0:
            if name[:stop] in self._stems:
                return module_of(name[:stop])
        return None

    @cached_property
    def _stems(self) -> Collection[str]:
        """Return the names of all tensors and of all modules of weights.

        Modules that an adapter wraps count too.
        """
        endings = tuple(f"{base}{end}" for base in ("", _BASE_LAYER) for end in (WEIGHT_SUFFIX, *self._values))
        stems = set(self._names)
        for ending in endings:
            stems.update([name[: -len(ending)] for name in self._names if name.endswith(ending)])
        return stems

    def _is_marker(self, name: str, words: Collection[str]) -> bool:
        owner, _, last = name.rpartition(".")
        if not owner:
            return True
        # Elsewhere only such a word tells it from a small parameter. The tensors beside a weight are not markers.
        return last in words and not self._has_weight(owner)

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
    for ending, instead in values.items():
        if tensor.endswith(ending):
            return tensor.removesuffix(ending) + instead
    return tensor


def _find_tail(name: str) -> int:
    """Return the position of the dot before the last three components, or 0."""
    position = len(name)
    for _ in range(3):
        position = name.rfind(".", 0, position)
        if position < 0:
            return 0
    return position


def _match_transform(tail: str) -> tuple[int, bool] | None:
    """Match the end of a name with the expressions for transforms and scales.

    Returns:
        the length of the end that matches, and whether it is a scale; None without a match.
    """
    if (match := _TRANSFORM.search(tail)) is not None:
        return len(tail) - match.start(1), False
    match = _SCALE.search(tail)
    return None if match is None else (len(tail) - match.start(1), True)
