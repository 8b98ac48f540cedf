"""Compare the sizes in config.json with the headers.

This happens before transformers builds a model. A model takes memory and time for each layer, expert and label, and
config.json is untrusted: a few bytes of it can declare a million layers. A checkpoint has at least one tensor for
each layer, and one tensor or row for each expert and label. Other sizes, such as `vocab_size`, cost nothing in a
model without weights, so their limit is the same for all checkpoints. Real numbers of positions can be larger than
any tensor, so only the process that builds the model limits their tables.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# The config of a tower is two or three levels below the top.
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class _Kind:
    """The settings that count one thing.

    Attributes:
        key: matches their keys.
        few: a number that is always allowed, because it is built within a second. MODEL can be one shard of many.
        has_rows: whether a row of a tensor is enough for each.
    """

    key: re.Pattern[str]
    few: int
    has_rows: bool = False


def _kind(endings: str, few: int, *, has_rows: bool = False) -> _Kind:
    # `hidden_size_per_layer` is a size, and `max_depth` is a distance in an image.
    return _Kind(re.compile(rf"(?!max_|min_|\w*(size|dim|token|topk))(\w+_)?({endings})", re.ASCII), few, has_rows)


_KINDS = (
    # `num_hidden_layers`, `n_layer`, `encoder_layers`, `depths`, `layer_types`, `attention_types`
    _kind(r"layers?|blocks?|depths?|(layers?|blocks?|attention)_types?|layers_block_type", 256),
    # `num_block_repeats`, `blocks_per_stage`, `num_hidden_groups`, `num_codebooks`
    _kind(r"repeats?|stages?|hidden_groups|(layers|blocks)_per_\w+|convs|flows|codebooks|quantizers|networks", 256),
    # `num_local_experts`, `n_routed_experts`, `zero_expert_num`
    _kind(r"experts|experts?_num|num_experts?", 1024, has_rows=True),
    # A model without a head can keep more labels from its training than it has rows.
    _kind(r"labels|classes", 100_000, has_rows=True),
    # Sizes cost nothing in a model without weights, but no real tensor is so large.
    _Kind(
        re.compile(r"(\w+_)?(vocab_size|hidden_size|intermediate_size|d_model|d_ff|n_embd|ffn_dim)"),
        10**8,
        has_rows=True,
    ),
)


def find_excess(config: Mapping[str, Any], tensors: int, rows: int) -> str | None:
    """Find a setting at any depth of a config that the headers contradict.

    Args:
        tensors: the number of tensors in the checkpoint.
        rows: the largest dimension of a tensor.

    Returns:
        a sentence about the setting; None if there is none.
    """
    for key, value, depth in _walk(config):
        if depth > MAX_DEPTH:
            return f"config.json is nested deeper than {MAX_DEPTH} levels"
        for kind in _KINDS:
            limit = max(kind.few, tensors, rows if kind.has_rows else 0)
            if kind.key.fullmatch(key) and _largest(value) > limit:
                return f"{key[:60]} in config.json is above {limit}, and the checkpoint has {tensors} tensors"
    return None


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yield (key, value, depth) of each setting at any depth."""
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        yield key, value, depth
        if depth > MAX_DEPTH:
            continue
        if isinstance(value, Mapping):
            waiting += ((str(name), inner, depth + 1) for name, inner in value.items())
        elif isinstance(value, list):
            waiting += ((key, inner, depth + 1) for inner in value if isinstance(inner, (Mapping, list)))


def _largest(value: Any) -> float:
    """Return a number, or a list's largest number or length; 0 for other values."""
    if isinstance(value, list):
        return max(len(value), *(one for one in value if isinstance(one, (int, float))), 0)
    return value if isinstance(value, (int, float)) else 0
