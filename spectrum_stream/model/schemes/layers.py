"""The settings of a single module: GPTQModel's `dynamic` and auto-round's `extra_config`."""

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import QuantizationConfig
from ..no_score import NoScore
from ..quantization import Unreadable
from .patterns import NotPlain, count_steps, matches

# Patterns are tried for each module, so their number is limited. Names of single modules are not patterns.
_MAX_PATTERNS = 256
# 100,000 modules with two patterns of 30 characters each take half of these steps. All steps take 30 seconds.
_MAX_STEPS = 300_000_000
_MAX_COMPONENTS = 32
# A pattern that only one name matches.
_LITERAL = re.compile(r"\^?((?:[\w\-]|\\\.)+)\$")
_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """The rules of a config.

    Attributes:
        setting: its key, `dynamic`.
        exact: (position, settings) by the name of a module; settings are None for a module that is not quantized.
        patterns: (position, pattern, settings).
        anywhere: whether a pattern may match any part of a name.
    """

    setting: str
    exact: Mapping[str, tuple[int, Mapping[str, Any] | None]]
    patterns: tuple[tuple[int, str, Mapping[str, Any] | None], ...]
    anywhere: bool


class Layers:
    """Finds the settings of each module of a checkpoint."""

    def __init__(self, config: QuantizationConfig) -> None:
        self._config = config
        self._data = dict(config.data)
        self._steps = 0
        self._rules = [r for r in (_read_dynamic(config), _read_extra_config(config)) if r is not None]

    @property
    def has_rules(self) -> bool:
        """Whether any module can have its own settings."""
        return bool(self._rules)

    def config_of(self, module: str) -> QuantizationConfig | Unreadable:
        """Return the config with the settings of a module.

        Return `Unreadable` if the rules cannot be applied, or say that the module is not quantized.
        """
        override: dict[str, Any] = {}
        for rules in self._rules:
            try:
                self._count_steps(rules, module)
                found = _find_rule(rules, module)
            except NotPlain as error:
                return Unreadable(NoScore.NOT_UNDERSTOOD, f"a pattern in {rules.setting}, {str(error)[:60]}")
            if found is None:
                return Unreadable(NoScore.NOT_UNDERSTOOD, f"quantized, but {rules.setting} says that it is not")
            if found.get("data_type") == "float":
                return Unreadable(NoScore.NOT_UNDERSTOOD, f"{rules.setting} with data_type = float")
            override |= found
        # A config can have the settings of each module, and a copy for each would take quadratic time.
        return replace(self._config, data=ChainMap(override, self._data)) if override else self._config

    def _count_steps(self, rules: _Rules, module: str) -> None:
        """Check that the patterns can be matched in limited time.

        Raises:
            NotPlain: the patterns and the names of all modules so far take too many steps.
        """
        if len(rules.patterns) <= _MAX_PATTERNS:
            self._steps += sum(count_steps(pattern, module) for _, pattern, _ in rules.patterns)
        if self._steps > _MAX_STEPS:
            raise NotPlain("one of those that take too long")


def _find_rule(rules: _Rules, module: str) -> Mapping[str, Any] | None:
    """Return the settings of the first rule for a module, {} without a rule, None if it is not quantized."""
    if len(rules.patterns) > _MAX_PATTERNS:
        raise NotPlain(f"one of {len(rules.patterns)}")
    first, found = rules.exact.get(module, (None, {}))
    # auto-round takes a name for a pattern if no module has it.
    if rules.anywhere and first is None and (part := next((p for p in _parts(module) if p in rules.exact), None)):
        raise NotPlain(part)
    for position, pattern, settings in rules.patterns:
        if first is not None and first < position:
            break
        if matches(pattern, module, rules.anywhere):
            return settings
    return found


def _parts(module: str) -> Iterator[str]:
    """Yield the paths inside a name."""
    components = module.split(".")
    if len(components) > _MAX_COMPONENTS:
        raise NotPlain(module)
    for start in range(len(components)):
        for stop in range(start + 1, len(components) + 1):
            yield ".".join(components[start:stop])


def _read_dynamic(config: QuantizationConfig) -> _Rules | None:
    """Read GPTQModel's `dynamic`: the first pattern that matches from the start counts.

    A pattern after `-:` means that the module is not quantized. (gptqmodel 7.7.0, quantization/config.py,
    `_resolve_dynamic_override`)
    """
    rules = config.data.get("dynamic")
    if not isinstance(rules, Mapping):
        return None
    exact: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
    patterns: list[tuple[int, str, Mapping[str, Any] | None]] = []
    for position, (key, value) in enumerate(rules.items()):
        settings = None if key.startswith("-:") or not isinstance(value, Mapping) else value
        pattern = key.removeprefix("-:") if key.startswith("-:") else key.removeprefix("+:")
        name = _LITERAL.fullmatch(pattern)
        if name is None:
            patterns.append((position, pattern, settings))
        else:
            exact.setdefault(name[1].replace("\\.", "."), (position, settings))
    return _Rules(setting="dynamic", exact=exact, patterns=tuple(patterns), anywhere=False)


def _read_extra_config(config: QuantizationConfig) -> _Rules | None:
    """Read auto-round's `extra_config`: the name of a module, or else a pattern that matches any part of a name.

    A module of 16 bits is not quantized. (auto-round 0.16.1, inference/utils.py, `_expand_regex_config`)
    """
    rules = config.data.get("extra_config")
    if not isinstance(rules, Mapping):
        return None
    exact: dict[str, tuple[int, Mapping[str, Any] | None]] = {}
    patterns: list[tuple[int, str, Mapping[str, Any] | None]] = []
    for position, (key, value) in enumerate(rules.items()):
        bits = value.get("bits") if isinstance(value, Mapping) else 16
        settings = None if type(bits) is int and bits >= 16 else value
        if _NAME.fullmatch(key):
            exact[key] = (-1, settings)
        else:
            patterns.append((position, key, settings))
    return _Rules(setting="extra_config", exact=exact, patterns=tuple(patterns), anywhere=True)
