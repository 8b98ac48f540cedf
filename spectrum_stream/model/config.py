"""The content of config.json: an untrusted mapping. All types are checked here.

    model_type        the family                              text_config       the language model of a larger model
    architectures     the classes of the model                vision_config     its vision tower
    num_hidden_layers, num_experts, tie_word_embeddings       in the language model, or at the top
    quantization_config, compression_config, quantization     at the top, in parts of the model, or in other files

A value of the wrong type counts as missing. So does a number or a list that no model has: a number above
`LARGEST_NUMBER`, more than `MOST_CLASSES` classes, and a name of more than `LONGEST_NAME` characters.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

LARGEST_NUMBER = 10**9
MOST_CLASSES = 100
LONGEST_NAME = 200

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_COUNT = re.compile(r"layer|block|hidden_groups|depth")
_CAUSAL_LM = re.compile(r"(ForCausalLM|LMHeadModel)$")
_MULTIMODAL = re.compile(r"ForConditionalGeneration$")
# MLX has its own name.
_QUANTIZATION = ("quantization_config", "compression_config", "quantization")
# AutoAWQ has other names in its own file.
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_DEFAULT_BLOCK = (128, 128)
# Parts of a model have parts: the language model of Qwen-Omni's thinker.
_PART_DEPTH = 3


# Without slots, because the settings that each weight needs are kept.
@dataclass(frozen=True)
class QuantizationConfig:
    """The settings of quantized weights; empty if there are none.

    Attributes:
        data: the settings of all places that state them; the first place counts.
        disagreements: the two places by each setting on which they differ.
    """

    data: Mapping[str, Any]
    disagreements: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def quant_method(self) -> str | None:
        """The name of the format; "" if it is not a string, None if there is none."""
        return None if "quant_method" not in self.data else _text(self.data["quant_method"]) or ""

    @property
    def bits(self) -> int | None:
        """Bits of a packed integer, 1 to 8, for all weights."""
        # AutoAWQ has other names in its own file.
        return _bits(self.data.get("bits", self.data.get("w_bit")))

    @property
    def group_size(self) -> int | None:
        """The number of columns that share a scale, for all weights."""
        return _size(self.data.get("group_size", self.data.get("q_group_size")))

    @property
    def symmetric(self) -> bool | None:
        """Whether all zero points of GPTQ or AWQ are half of the range; None if the config does not say."""
        sym, zero_point = self.data.get("sym"), self.data.get("zero_point")
        if isinstance(sym, bool):
            return sym
        return not zero_point if isinstance(zero_point, bool) else None

    @cached_property
    def packed_integers(self) -> tuple[tuple[int, int | None], ...]:
        """(bits, group size) of the integers of all weights, or of each group of layers; None for whole rows."""
        found = [(self.bits, self.group_size)]
        found += [(_bits(w.get("num_bits")), _size(w.get("group_size"))) for w in self.groups]
        return tuple(dict.fromkeys((bits, size) for bits, size in found if bits is not None))

    @cached_property
    def block_sizes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) that share a scale of float8 or int8; default: 128 x 128."""
        found: list[tuple[int, int]] = []
        for block in (self.data.get("weight_block_size"), *(w.get("block_structure") for w in self.groups)):
            match [_size(side) for side in block] if isinstance(block, list) else []:
                case [int(rows), int(columns)]:
                    found.append((rows, columns))
        sizes = [_size(w.get("group_size")) for w in self.groups]
        found += [(1, size) for size in sizes if size is not None]
        return tuple(dict.fromkeys(found)) or (_DEFAULT_BLOCK,)

    @cached_property
    def has_zeros(self) -> bool:
        """Whether weights of all groups of layers have zero points."""
        said = [group.get("symmetric") for group in self.groups] or [self.symmetric]
        return all(symmetric is False for symmetric in said)

    @cached_property
    def has_no_zeros(self) -> bool:
        """Whether weights of all groups of layers have no zero points."""
        said = [group.get("symmetric") for group in self.groups]
        return bool(said) and all(symmetric is True for symmetric in said)

    @cached_property
    def numbers(self) -> tuple[str, int] | None:
        """The type, `int` or `float`, and the bits of all weights, if there is one group of layers that says both."""
        said = [(group.get("type"), _bits(group.get("num_bits"))) for group in self.groups]
        match said:
            case [("int" | "float" as type_, int(bits))]:
                return type_, bits
        return None

    @cached_property
    def has_order(self) -> bool:
        """Whether weights of all groups of layers have columns in another order than that of the scales."""
        said = [group.get("actorder") for group in self.groups]
        return bool(said) and all(order in ("group", "dynamic") for order in said)

    @property
    def is_dense(self) -> bool:
        """Whether stored weights are plain numbers, which a program rounds when it uses them."""
        return self.data.get("format") == "dense" and not self.disagreements

    @property
    def groups(self) -> Iterator[Mapping[str, Any]]:
        """The weights of each group of layers, as compressed-tensors describes them."""
        for group in _mapping(self.data.get("config_groups")).values():
            if isinstance(weights := _mapping(group).get("weights"), Mapping):
                yield weights


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """config.json of a checkpoint.

    Attributes:
        data: its content; empty if there is none.
        quantization_files: the files beside it that state the quantization, by their names.
    """

    data: Mapping[str, Any]
    quantization_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """The family, `llama`."""
        return _text(self.data.get("model_type"))

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes of the model, `LlamaForCausalLM`."""
        names = self.data.get("architectures")
        if not isinstance(names, list) or len(names) > MOST_CLASSES:
            return ()
        return tuple(name for name in names if _text(name) is not None)

    @property
    def has_code(self) -> bool:
        """Whether the repo has code of its own for the model, which some trainers run."""
        return any(
            isinstance(name, str) and name.startswith("AutoModel") for name in _mapping(self.data.get("auto_map"))
        )

    @property
    def text(self) -> Mapping[str, Any]:
        """The config of the language model in a multimodal model; empty if there is none."""
        return _mapping(self.data.get("text_config"))

    @property
    def layer_count(self) -> int | None:
        """The number of layers of the language model."""
        return _first(_integer(part.get(name)) for part in (self.text, self.data) for name in _LAYER_COUNTS)

    @property
    def other_counts(self) -> frozenset[int]:
        """The other numbers of layers, blocks and groups of layers, such as `num_hidden_groups`."""
        counts = {
            number
            for part in (self.text, self.data)
            for key, value in part.items()
            if _COUNT.search(str(key)) and (number := _integer(value)) is not None
        }
        return frozenset(counts - {self.layer_count})

    @property
    def expert_count(self) -> int | None:
        """The number of routed experts of each sparse layer."""
        # DBRX has it in its feed-forward part.
        parts = (self.text, _mapping(self.data.get("ffn_config")), self.data)
        return _first(_integer(part.get(name)) for part in parts for name in _EXPERT_COUNTS)

    @property
    def is_causal(self) -> bool:
        """Whether the model is a causal language model by its class."""
        return any(map(is_causal_class, self.architectures))

    @property
    def is_multimodal(self) -> bool:
        """Whether the model is a language model with towers.

        T5 has the same kind of class but no towers.
        """
        has_parts = any(isinstance(self.data.get(part), Mapping) for part in ("text_config", "vision_config"))
        return has_parts and any(_MULTIMODAL.search(name) for name in self.architectures)

    @property
    def ties_embeddings(self) -> bool | None:
        """Whether the head is the embedding; None for the default of the family."""
        flags = [part.get("tie_word_embeddings") for part in (self.data, self.text)]
        said = [flag for flag in flags if isinstance(flag, (bool, int, float))]
        return any(said) if said else None

    @property
    def quantization(self) -> QuantizationConfig:
        """The quantization of the model, from all places that state it: config.json, its parts, other files."""
        parts = list(_quantizations_of_parts(self.data, _PART_DEPTH))
        if any(part != parts[0][1] for _, part in parts):
            return QuantizationConfig({"quant_method": "two configs of parts of the model that differ"})
        # Without one in config.json, the source has added that of the first file.
        files = list(self.quantization_files.values())
        own = [(name, part) for name, part in _quantizations_of(self.data) if not any(part is one for one in files)]
        return _combine([*own, *self.quantization_files.items(), *parts])


def _combine(places: Sequence[tuple[str, Mapping[str, Any]]]) -> QuantizationConfig:
    """Combine the settings of (place, settings) pairs; the first place of a setting counts."""
    data: dict[str, Any] = {}
    said: dict[str, tuple[str, Any]] = {}
    disagreements: dict[str, tuple[str, str]] = {}
    for place, stated in places:
        if isinstance(inner := stated.get("quantization"), Mapping):
            # ModelOpt's own file, hf_quant_config.json, has two parts.
            outer = {key: value for key, value in stated.items() if key != "quantization"}
            stated = {"quant_method": "modelopt"} | outer | dict(inner)
        data = {**stated, **{key: value for key, value in data.items() if value is not None}}
        for key, value in _comparable(stated).items():
            first, other = said.setdefault(key, (place, value))
            if not _is_same(value, other):
                disagreements.setdefault(key, (first, place))
    return QuantizationConfig(data, disagreements)


def _comparable(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under the names that all writers share, with those that they imply."""
    settings = {_ALIASES.get(key, key): value for key, value in stated.items() if value is not None}
    groups = list(QuantizationConfig(stated).groups)
    for key, of_group in (("bits", "num_bits"), ("group_size", "group_size")):
        # ModelOpt states the number for all weights in one file, and that of a group of layers in the other.
        numbers = {number for group in groups if (number := _integer(group.get(of_group))) is not None}
        if len(numbers) == 1:
            settings.setdefault(key, *numbers)
    if settings.get("quant_method") == "gptq" or "desc_act" in settings:
        # Without a format, zero points are stored as in GPTQ's first format.
        settings.setdefault("checkpoint_format", settings.get("format", "gptq"))
    return settings


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return value.casefold() == other.casefold()
    # 1 is not True.
    return type(value) is type(other) and bool(value == other)


def _quantizations_of(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, part) for name in _QUANTIZATION if isinstance(part := config.get(name), Mapping)]


def _quantizations_of_parts(config: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the quantization of the parts of a model, such as `thinker_config.text_config`, with their places."""
    for key, part in config.items():
        if key.endswith("_config") and key not in _QUANTIZATION and isinstance(part, Mapping):
            if own := _quantizations_of(part):
                yield from ((f"{key}.{name}", stated) for name, stated in own)
            elif depth > 1:
                yield from ((f"{key}.{name}", stated) for name, stated in _quantizations_of_parts(part, depth - 1))


def is_causal_class(name: str) -> bool:
    """Whether a class is a causal language model by its name: `LlamaForCausalLM`."""
    return _CAUSAL_LM.search(name) is not None


def _first(numbers: Iterator[int | None]) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _integer(value: Any) -> int | None:
    """Return the value if it is an integer from 1 to `LARGEST_NUMBER`, not a bool."""
    return value if type(value) is int and 0 < value <= LARGEST_NUMBER else None


def _size(value: Any) -> int | None:
    """Return the size of a group or block of weights, or None.

    A size above any row or column means the whole row or column.
    """
    return min(value, LARGEST_NUMBER) if type(value) is int and value > 0 else None


def _bits(value: Any) -> int | None:
    bits = _integer(value)
    return bits if bits is not None and bits <= 8 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= LONGEST_NAME else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
