"""Find what a format does not read: a tensor beside a weight, a setting, an entry of the metadata, a marker."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..quantization import Quantization
from . import harmless
from .companions import Companions
from .format import Format, Values

_LONGEST_NAME = 60


def find_unread_beside(
    scheme: Format, weight: TensorInfo, found: list[Quantization], companions: Companions
) -> str | None:
    """Name the first tensor beside a weight that its format does not read.

    Return None if it reads all of them.

    Args:
        found: the weight, or its experts.
    """
    parts = {part.tensor for one in found for part in one.parts}
    beside = (*harmless.COMPANIONS, *scheme.markers)
    for tensor, ending in companions.beside(weight.name):
        if tensor not in parts and ending not in beside:
            return f"an unknown tensor beside it, {_short(ending)}"
    return None


def find_unread_elsewhere(scheme: Format, companions: Companions, config: QuantizationConfig) -> str | None:
    """Name the first setting, entry of the metadata or marker of the checkpoint that a format does not read.

    Return None if it reads all of them.
    """
    return _find_unread_setting(scheme, config) or _find_unread_marker(scheme, companions)


def _find_unread_setting(scheme: Format, config: QuantizationConfig) -> str | None:
    if config.quant_method not in scheme.methods:
        return f"an unknown setting, quant_method = {_short(config.data.get('quant_method'))}"
    settings = {**harmless.SETTINGS, **scheme.settings}
    path = next(_walk(config.data, settings), None)
    return None if path is None else f"an unknown setting, {path}"


def _find_unread_marker(scheme: Format, companions: Companions) -> str | None:
    for key, value in companions.metadata:
        if key not in scheme.metadata and not _is_accepted(value, _find_values(key, harmless.METADATA)):
            return f"unknown metadata, {_short(key)} = {_short(value)}"
    marker = next((name for name in companions.markers if name.rpartition(".")[2] not in scheme.markers), None)
    return None if marker is None else f"an unknown tensor, {_short(marker)}"


def _walk(
    settings: Mapping[str, Any], known: Mapping[str, Values], prefix: str = "", shown: str = ""
) -> Iterator[str]:
    """Yield `key = value` for each setting that is not known, or has a value that is not.

    Args:
        prefix, shown: the path to the settings, with `*` for any key, and as it is.
    """
    for key, value in settings.items():
        # An empty value is the same as none.
        if value is None:
            continue
        paths = [path for path in (f"{prefix}{key}", f"{prefix}*") if _leads_to(path, known)]
        path = paths[0] if paths else ""
        if path in known:
            accepted = _is_accepted(value, known[path])
        else:
            accepted = bool(path) and isinstance(value, Mapping)
            if accepted:
                yield from _walk(value, known, f"{path}.", f"{shown}{key}.")
        if not accepted:
            yield f"{_short(f'{shown}{key}')} = {_short(value)}"


def _leads_to(path: str, known: Mapping[str, Values]) -> bool:
    return path in known or any(name.startswith(f"{path}.") for name in known)


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
