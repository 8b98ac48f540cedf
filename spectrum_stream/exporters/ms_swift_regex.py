"""ms-swift: `trainable_parameters_regex`, one regular expression for all.

As `ms_swift`; the parameters are trained in whose names the expression is found. (swift/utils/transformers_utils.py,
activate_parameters)
"""

import re
from collections.abc import Collection, Iterable

import yaml

from ..selection import Selection
from .targets import exactly, targets_of

SUFFIX = "yaml"
ADVICE = "for full-parameter training; the same keys are options of `swift sft`"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The config.

    Raises:
        ResultError: no_such_parameter.
    """
    names = targets_of(selection, parameters).parameters
    config = {"freeze_parameters_ratio": 1, "trainable_parameters_regex": exactly(names)}
    return yaml.safe_dump(config, sort_keys=False, width=10_000)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that ms-swift trains, given a config with this text."""
    pattern = re.compile(yaml.safe_load(text)["trainable_parameters_regex"])
    return {name for name in parameter_names if pattern.search(name)}
