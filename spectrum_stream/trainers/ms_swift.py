"""ms-swift: `trainable_parameters`, a list of names.

With `freeze_parameters_ratio` 1 in full-parameter training everything is frozen, and then the parameters are trained
whose names start with an entry of the list. (swift/utils/transformers_utils.py, freeze_parameters and
activate_parameters)
"""

from collections.abc import Collection, Iterable, Mapping

import yaml

from ..selection.select import Selection
from .patterns import Names
from .targets import inexact, needs_names, targets_of

SUFFIX = "yaml"
ADVICE = "for full-parameter training; the same keys are options of `swift sft`"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The config.

    Raises:
        ResultError: inexact, a name that others start with; needs_names, where that cannot be known, of banks of
            experts; no_such_parameter.
    """
    targets = targets_of(selection, parameters)
    names = targets.parameters
    trained = set(names)
    for name in names:
        if others := [other for other in targets.starting_with(name) if other not in trained]:
            raise inexact(f"{name} would train {others[0]} as well", "--format ms-swift-regex names it exactly")
    # Beside `experts.down_proj` there can be `experts.down_proj_bias`, which no result lists.
    if not targets.complete and any(target.is_bare for target in targets.chosen):
        raise needs_names("a list of names that others can start with")
    config = {"freeze_parameters_ratio": 1, "trainable_parameters": list(names)}
    return yaml.safe_dump(config, sort_keys=False, width=10_000)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that ms-swift trains, given a config with this text."""
    config, names = yaml.safe_load(text), Names(parameter_names)
    starts = config["trainable_parameters"]
    if not freezes_all(config):
        return set(names.all)
    return {name for start in starts for name in names.starting_with(start)}


def freezes_all(config: Mapping[str, object]) -> bool:
    """Whether everything is frozen before the chosen ones are trained; else they are trained beside the others."""
    ratio = config.get("freeze_parameters_ratio", 0)
    return isinstance(ratio, (int, float)) and ratio >= 1
