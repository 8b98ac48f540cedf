"""ms-swift: `trainable_parameters`, a list of names, or `trainable_parameters_regex`, one regular expression.

In full-parameter training with `freeze_parameters_ratio: 1` ms-swift first freezes everything. It then trains each
parameter with a name that starts with an entry of the list, or in which the expression is found.
(ms-swift 4.6.0, swift/utils/transformers_utils.py, freeze_parameters and activate_parameters)

The list is written if it is exact. If other parameters start with the name of a chosen one, the expression is.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .parameters import Parameters
from .patterns import alternatives
from .targets import Targets, exactly, targets_of
from .trainer import Entry, Finding, Trainer, adapter_findings, find_matches, strings

_LIST = "trainable_parameters"
_REGEX = "trainable_parameters_regex"

# ms-swift starts itself again with its config as arguments, and an argument on Linux can have 32 pages.
_MAX_NBYTES = 131_072


class MsSwift(Trainer):
    """ms-swift, by names or by an expression."""

    name = "ms-swift"
    suffix = "yaml"
    advice = "use it for full-parameter training; `swift sft` has options of the same names"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the config.

        Raises:
            ResultError: too_large, the list is not exact and the expression too long; no_such_parameter,
                nothing_chosen.
        """
        targets = targets_of(selection, parameters)
        names: list[str] | str = list(targets.parameters)
        key = _LIST
        if not _is_exact(targets):
            key, names = _REGEX, exactly(names)
            if len(names.encode()) >= _MAX_NBYTES:
                raise ResultError(
                    f"an expression of {len(names)} characters is too long for the command line of ms-swift",
                    reason="too_large",
                    hint="choose fewer modules, or another format",
                )
        return yaml.safe_dump({"freeze_parameters_ratio": 1, key: names}, sort_keys=False, width=10_000)

    def entries(self, text: str) -> list[Entry]:
        config = yaml.safe_load(text)
        if not config.keys() & {_LIST, _REGEX}:
            raise KeyError(_LIST)
        parts = alternatives(config[_REGEX]) if config.get(_REGEX) else []
        return [*_starts(config), *(Entry(part, re.compile(part), False) for part in parts)]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        config = yaml.safe_load(text)
        if not _freezes_all(config):
            return set(names)
        # The expression counts as a whole, because a flag or a group of one alternative can affect another one.
        whole = [Entry(config[_REGEX], re.compile(config[_REGEX]), False)] if config.get(_REGEX) else []
        return find_matches([*_starts(config), *whole], names)

    def advise_all(self, text: str) -> str:
        return "choose fewer" if _freezes_all(yaml.safe_load(text)) else "set freeze_parameters_ratio: 1"

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        config = yaml.safe_load(text)
        return adapter_findings("tuner_type", config.get("tuner_type", config.get("train_type", "full")))


def _is_exact(targets: Targets) -> bool:
    """Whether only chosen parameters start with the names of chosen parameters."""
    # A parameter `experts.down_proj` can have a neighbor `experts.down_proj_bias`, which no result lists.
    if not targets.complete and any(target.is_bare for target in targets.chosen):
        return False
    names = set(targets.parameters)
    return all(names.issuperset(targets.starting_with(name)) for name in names)


def _starts(config: Mapping[str, Any]) -> list[Entry]:
    return [Entry(start, re.compile(re.escape(start))) for start in strings(config.get(_LIST) or [])]


def _freezes_all(config: Mapping[str, Any]) -> bool:
    """Whether ms-swift first freezes all parameters; otherwise it trains all of them."""
    ratio = config.get("freeze_parameters_ratio", 0)
    return isinstance(ratio, (int, float)) and ratio >= 1
