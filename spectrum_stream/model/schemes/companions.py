"""The tensors that are needed to read a quantized weight: its scales, zero points and column order."""

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
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
_MAX_COMPONENTS = 64

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
        # Most checkpoints have none of these endings, or those of one format.
        packed = [name for name in self._names if name.endswith(tuple(values))]
        self._values = {end: instead for end, instead in values.items() if any(n.endswith(end) for n in packed)}
        entries = (entry for metadata in checkpoint.metadata.values() for entry in metadata.items())
        self.metadata = tuple(dict.fromkeys(entries))
        self._is_harmless = is_harmless
        self._transforms, self._scales = self._find_transforms()
        owners = [(name, self._find_adapted(name)) for name in checkpoint.adapter]
        # The first of each weight is enough.
        self._adapter = {owner: name for name, owner in reversed(owners) if owner is not None}
        self.markers = (
            *(
                name
                for name, tensor in self._tensors.items()
                if prod(tensor.info.shape) <= _LARGEST_MARKER and self._is_marker(name) and name not in top_tensors
            ),
            *(name for name, owner in owners if owner is None),
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

    def siblings(self, tensor: str) -> Iterator[tuple[str, str]]:
        """Find the tensors `X_*` beside `X.weight` that are not parameters and belong to no other weight.

        Returns:
            (name, ending), as `beside` does.
        """
        owner = module_of(self.parameter_of(tensor))
        start = f"{owner}_"
        for i in range(bisect_left(self._names, start), len(self._names)):
            name = self._names[i]
            if not name.startswith(start):
                break
            # Modules `X_y` and fused experts are not tensors of X.
            is_parameter = name.endswith(("weight", "bias", *self._values)) or len(self._tensors[name].info.shape) > 2
            if "." not in name[len(start) :] and not is_parameter and self._find_adapted(name) == owner:
                yield name, name.removeprefix(owner)

    def transform_of(self, tensor: str) -> str | None:
        """Return a tensor of a parent module that changes the weight that a tensor stores, if any.

        Such as `P.smooth_scale` or `P.act.scales` for `P.X.weight`.
        """
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
        for name, tensor in self._tensors.items():
            match, is_scale = _TRANSFORM.search(name), False
            if match is None:
                match, is_scale = _SCALE.search(name), True
            module = name.removesuffix(WEIGHT_SUFFIX)
            if match is None or self._is_harmless(name) or self._has_weight(module.rpartition(".")[0]):
                continue
            # A scale for a whole tensor, and one for each expert, are other things.
            if is_scale and (prod(tensor.info.shape) <= 1 or len(tensor.info.shape) > 2):
                continue
            if self._find_adapted(module) is None:
                start = match.start(1)
                parent = name[:start].rpartition(".")[0]
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
        endings = ("", *(f"{base}{end}" for base in ("", _BASE_LAYER) for end in (WEIGHT_SUFFIX, *self._values)))
        # Names have few components. A name with many is not from a model.
        signs = [match.start() for match in re.finditer(r"[._]", name)][:_MAX_COMPONENTS]
        for stop in reversed(signs):
            if any(f"{name[:stop]}{ending}" in self._tensors for ending in endings):
                return module_of(name[:stop])
        return None

    def _is_marker(self, name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if not owner:
            return True
        # Elsewhere only such a word tells it from a small parameter. The tensors beside a weight are not markers.
        return _MARKER.search(last) is not None and not self._has_weight(owner)

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
