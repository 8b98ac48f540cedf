"""Python: a function that freezes a torch model, for any trainer that takes a model."""

import ast
from collections.abc import Collection, Iterable

from ..selection.select import Selection
from .targets import targets_of
from .trainer import Entry, Trainer, exact

_CODE = '''"""The parameters to train, and a function that freezes all others of a torch model."""

TRAINED = {trained}

# Trained if the model has them under these names.
TRAINED_IF_THERE = {always}


def freeze(model):
    """Train the parameters above and freeze the rest; if one is missing, raise ValueError and change nothing."""
    parameters = dict(model.named_parameters())
    missing = set(TRAINED) - set(parameters)
    if missing:
        raise ValueError(f"the model has no {{sorted(missing)[0]}} ({{len(missing)}} are missing)")
    for name, parameter in parameters.items():
        parameter.requires_grad = name in TRAINED or name in TRAINED_IF_THERE
'''


class Python(Trainer):
    """A trainer that takes a torch model."""

    name = "python"
    suffix = "py"
    advice = "call freeze(model) before you make the trainer or the optimizer"
    takes = "Python"

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the source.

        Raises:
            ResultError: no_such_parameter, nothing_chosen.
        """
        targets = targets_of(selection, parameters)
        trained = dict.fromkeys(target.parameter for target in targets.chosen)
        always = (name for name in targets.always if name not in trained)
        return _CODE.format(trained=_list_source(trained), always=_list_source(always))

    def entries(self, text: str) -> list[Entry]:
        """Read both lists; the source is parsed, never run."""
        lists = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        return [exact(name) for name in (*lists["TRAINED"], *lists["TRAINED_IF_THERE"])]


def _list_source(names: Iterable[str]) -> str:
    lines = [f"    {name!a},\n" for name in names]
    return f"[\n{''.join(lines)}]" if lines else "[]"
