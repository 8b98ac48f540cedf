"""Find what a format does not read: a tensor beside a weight, a setting, an entry of the metadata, a marker."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..quantization import Quantization
from . import harmless
from .companions import Companions
from .format import Format, Values
from .unknown import describe

_LONGEST_NAME = 60


def find_unread_beside(
    read: Collection[str], weight: TensorInfo, found: list[Quantization], companions: Companions
) -> str | None:
    """Name the first tensor beside a weight that its format does not read.

    Return None if it reads all of them.

    Args:
        read: the endings of the tensors beside a weight that its format reads, or that are harmless.
        found: the weight, or its experts.
    """
    if (adapter := companions.adapter_of(weight.name)) is not None:
        return f"a part of an adapter beside it, {_short(adapter[-_LONGEST_NAME:])}"
    parts = {part.tensor for one in found for part in one.parts}
    for tensor, ending in chain(companions.beside(weight.name), companions.siblings(weight.name)):
        if tensor not in parts and ending not in read:
            return f"an unknown tensor beside it, {_short(ending)}"
    if (transform := companions.transform_of(weight.name)) is not None:
        return f"a tensor of a module above it, {_short(transform[-_LONGEST_NAME:])}"
    return None


def find_unread_elsewhere(scheme: Format, companions: Companions, config: QuantizationConfig) -> str | None:
    """Name the first setting, entry of the metadata or marker of the checkpoint that a format does not read.

    Return None if it reads all of them.
    """
    return _find_unread_setting(scheme, config) or _find_unread_marker(scheme, companions)


def _find_unread_setting(scheme: Format, config: QuantizationConfig) -> str | None:
    for key, places in config.disagreements.items():
        if key not in harmless.MAY_DIFFER:
            return f"two configs that disagree on {_short(key)}, {_short(' and '.join(places))}"
    if config.quant_method not in scheme.methods:
        return f"an unknown setting, quant_method = {_short(describe(config) or config.data.get('quant_method'))}"
    known = _make_tree({**harmless.SETTINGS, **scheme.settings})
    path = next(_walk(config.data, known), None)
    return None if path is None else f"an unknown setting, {path}"


def _find_unread_marker(scheme: Format, companions: Companions) -> str | None:
    for key, value in companions.metadata:
        if key not in scheme.metadata and not _is_accepted(value, _find_values(key, harmless.METADATA)):
            return f"unknown metadata, {_short(key)} = {_short(value)}"
    marker = next((name for name in companions.markers if name.rpartition(".")[2] not in scheme.markers), None)
    return None if marker is None else f"an unknown tensor, {_short(marker)}"


@dataclass(frozen=True, slots=True)
class _Leaf:
    """The values of a setting that is read."""

    values: Values


# The settings that are read, by the keys of nested mappings; `*` stands for any key, and `**` for any
# with a dot.
_Tree = dict[str, "_Tree | _Leaf"]


def _make_tree(settings: Mapping[str, Values]) -> _Tree:
    """Split paths such as `config_groups.*.format` into the keys of nested mappings."""
    tree: _Tree = {}
    for path, values in settings.items():
        *outer, last = path.split(".")
        branch = tree
        for key in outer:
            inner = branch.setdefault(key, {})
            assert isinstance(inner, dict)
            branch = inner
        branch[last] = _Leaf(values)
    return tree


def _walk(settings: Mapping[str, Any], known: _Tree, shown: str = "") -> Iterator[str]:
    """Yield `key = value` for each setting that is not known, or has a value that is not.

    Args:
        shown: the path to the settings.
    """
    for key, value in settings.items():
        # An empty value is the same as none.
        if value is None:
            continue
        readings = (known.get(key), known.get("**") if "." in key else None, known.get("*"))
        if any(isinstance(one, _Leaf) and _is_accepted(value, one.values) for one in readings):
            continue
        inner = next((one for one in readings if isinstance(one, dict)), None)
        if inner is not None and isinstance(value, Mapping):
            yield from _walk(value, inner, f"{shown}{key}.")
        else:
            yield f"{_short(f'{shown}{key}')} = {_short(value)}"


def _find_values(key: str, known: Mapping[str, Values]) -> Values:
    pattern = next((name for name in known if name.endswith("*") and key.startswith(name[:-1])), key)
    return known.get(pattern, ())


def _is_accepted(value: Any, values: Values) -> bool:
    if isinstance(values, re.Pattern):
        return isinstance(value, str) and values.fullmatch(value) is not None
    # 1 is not True, and 0 is not False.
    return values is None or any(type(value) is type(one) and value == one for one in values)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
