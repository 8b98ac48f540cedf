"""DistillKit: `frozen_res`, a list of expressions for the parameters to freeze.

DistillKit freezes a parameter if an expression of the list is found in its name, and trains it otherwise.
(arcee-ai/DistillKit, distillkit/main.py, load_student_model; not in a registry) So the file has one expression, which
is found in every name except the chosen ones.
"""

import re
from collections.abc import Collection, Iterable

import yaml

from ..selection.select import Selection
from .patterns import alternatives
from .targets import exactly, targets_of
from .trainer import Entry, Trainer, strings
from .yaml_text import listing


class DistillKit(Trainer):
    """DistillKit, by expressions for the frozen parameters."""

    name = "distillkit"
    suffix = "yaml"
    advice = "copy the list into your DistillKit config"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the part of the config.

        Raises:
            ResultError: no_such_parameter, nothing_chosen.
        """
        names = targets_of(selection, parameters).parameters
        return listing("frozen_res", [f"^(?!{exactly(names).removeprefix('^')})"])

    def entries(self, text: str) -> list[Entry]:
        spared = [re.fullmatch(r"\^\(\?!(\(\?:.*\)\$)\)", pattern) for pattern in _read_frozen(text)]
        return [Entry(part, re.compile(part)) for found in spared if found for part in alternatives(found[1])]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        frozen = [re.compile(pattern) for pattern in _read_frozen(text)]
        return {name for name in names if not any(pattern.search(name) for pattern in frozen)}


def _read_frozen(text: str) -> list[str]:
    return strings(yaml.safe_load(text)["frozen_res"])
