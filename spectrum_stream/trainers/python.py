"""Python: a function that freezes a torch model, with the names in it, for any trainer that takes a model."""

import ast
from collections.abc import Collection, Iterable

from ..selection.select import Selection
from .targets import targets_of

SUFFIX = "py"
ADVICE = "call freeze(model) before the trainer or the optimizer is made"

_CODE = '''"""The parameters that are trained, and a function that freezes all others of a torch model."""

TRAINED = {trained}

# Trained where the model has them under these names.
TRAINED_IF_THERE = {always}


def freeze(model):
    """Raises ValueError, and leaves the model as it was, if it lacks a parameter that is to be trained."""
    parameters = dict(model.named_parameters())
    missing = set(TRAINED) - set(parameters)
    if missing:
        raise ValueError(f"the model has no {{sorted(missing)[0]}} ({{len(missing)}} are missing)")
    for name, parameter in parameters.items():
        parameter.requires_grad = name in TRAINED or name in TRAINED_IF_THERE
'''


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The source.

    Raises:
        ResultError: no_such_parameter.
    """
    targets = targets_of(selection, parameters)
    trained = dict.fromkeys(target.parameter for target in targets.chosen)
    return _CODE.format(trained=_listed(trained), always=_listed(n for n in targets.always if n not in trained))


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that are trained; the source is read and not run."""
    lists = lists_of(text)
    return set(parameter_names) & {*lists["TRAINED"], *lists["TRAINED_IF_THERE"]}


def lists_of(text: str) -> dict[str, list[str]]:
    """The two lists of names of the source."""
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {name: lists[name] for name in ("TRAINED", "TRAINED_IF_THERE")}


def _listed(names: Iterable[str]) -> str:
    lines = [f"    {name!a},\n" for name in names]
    return f"[\n{''.join(lines)}]" if lines else "[]"
