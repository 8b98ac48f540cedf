"""ms-swift: `trainable_parameters_regex`, one regular expression for all.

As `ms_swift`; the parameters are trained in whose names the expression is found. (swift/utils/transformers_utils.py,
activate_parameters)
"""

import re
from collections.abc import Collection, Iterable

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .ms_swift import freezes_all
from .targets import exactly, targets_of

SUFFIX = "yaml"
ADVICE = "for full-parameter training; the same keys are options of `swift sft`"

# ms-swift starts itself again with its config as arguments; Linux takes 32 pages for one.
_MAX_NBYTES = 131_072


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The config.

    Raises:
        ResultError: too_large; no_such_parameter.
    """
    pattern = exactly(targets_of(selection, parameters).parameters)
    if len(pattern.encode()) >= _MAX_NBYTES:
        raise ResultError(
            f"an expression of {len(pattern)} characters is too long for the command line of ms-swift",
            reason="too_large",
            hint="--format ms-swift",
        )
    config = {"freeze_parameters_ratio": 1, "trainable_parameters_regex": pattern}
    return yaml.safe_dump(config, sort_keys=False, width=10_000)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that ms-swift trains, given a config with this text."""
    config, names = yaml.safe_load(text), list(parameter_names)
    pattern = re.compile(config["trainable_parameters_regex"])
    return {name for name in names if pattern.search(name)} if freezes_all(config) else set(names)
