"""DistillKit: `frozen_res`, what is not to be trained.

A parameter is frozen if an expression of the list is found in its name, and trained otherwise. (distillkit/main.py,
load_student_model) So one expression is written that is found in every name but the chosen ones.
"""

import re
from collections.abc import Collection, Iterable

import yaml

from ..selection.select import Selection
from .targets import exactly, targets_of

SUFFIX = "yaml"
ADVICE = "the list is a part of a config of DistillKit"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The part of the config.

    Raises:
        ResultError: no_such_parameter.
    """
    names = targets_of(selection, parameters).parameters
    return yaml.safe_dump({"frozen_res": [f"^(?!{exactly(names).removeprefix('^')})"]}, width=10_000)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that DistillKit trains, given a config with this text."""
    frozen = [re.compile(pattern) for pattern in yaml.safe_load(text)["frozen_res"]]
    return {name for name in parameter_names if not any(pattern.search(name) for pattern in frozen)}
