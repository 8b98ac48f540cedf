"""A format of quantized weights as data: its reader, and everything that the reader takes into account."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..quantization import Quantization, Unreadable
from .companions import Companions

# One `Quantization` for a weight, a list with one for each fused expert, or the reason why it cannot be read.
Found = Quantization | list[Quantization] | Unreadable

# The accepted values of a setting: these, a text that matches the pattern as a whole, or any.
Values = tuple[object, ...] | re.Pattern[str] | None
ANY: Values = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A row of the registry.

    A weight is scored only if every tensor beside it, every setting and every entry of the metadata is in one of
    these lists or in those of `harmless.py`. The ending of a tensor begins after the name of the module or parameter.

    Attributes:
        name: the name in messages, `gptq`.
        read: returns how a tensor is stored, why it cannot be read, or None if it is not in this format.
        dtypes: the dtypes of the tensors that `read` is called for; None for all.
        endings: the endings of their names; "" for all.
        companions: the endings of the tensors that become parts of a weight, `.weight_scale`.
        values: the endings of the tensors with the values, other than `.weight`, and the ending of the parameter.
        methods: the values of `quant_method` that it belongs to; None if config.json may have none.
        settings: the keys of the quantization config that it reads, with the values that it understands. Keys of
            nested mappings are joined by dots; `*` stands for any key, and `**` for any with a dot.
        metadata: the keys of a shard's metadata that it reads.
        markers: the tensors that it reads and that are not parts: endings beside a weight that begin with a dot, and
            names of tensors for the whole checkpoint.
    """

    name: str
    read: Callable[[TensorInfo, Companions, QuantizationConfig], Found | None]
    companions: tuple[str, ...]
    methods: tuple[str | None, ...]
    dtypes: tuple[str, ...] | None = None
    endings: tuple[str, ...] = ("",)
    values: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Values] = field(default_factory=dict)
    metadata: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
