"""DistillKit: `frozen_res`, a list of expressions for the parameters to freeze.

DistillKit freezes a parameter if an expression of the list is found in its name, and trains it otherwise.
(arcee-ai/DistillKit, distillkit/main.py, load_student_model; not in a registry) So the file has one expression, which
is found in every name except the chosen ones.
"""

import re
from collections.abc import Collection, Iterable

from ..selection.select import Selection
from .patterns import How, Names, alternatives, is_one_group
from .reading import read_yaml
from .targets import exactly, targets_of
from .trainer import Entry, Trainer, strings
from .yaml_text import listing

_SPARED = re.compile(r"\^\(\?!(\(\?:.*\)\$)\)", re.DOTALL)


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
        spared = map(_spared, _read_frozen(text))
        return [Entry(part, part) for pattern in spared if pattern for part in alternatives(pattern)]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        names = Names.of(names)
        trained = set(names)
        searched = []
        for pattern in _read_frozen(text):
            # Negating the expression of a list of names takes quadratic time, so the expression inside is matched.
            if (spared := _spared(pattern)) is None:
                searched.append(Entry(pattern, pattern, How.SEARCH))
            else:
                trained &= names.matched([Entry(spared, spared)])
        return trained - names.matched(searched)


def _spared(pattern: str) -> str | None:
    """Return `X$` of `^(?!X$)`, which matches the parameters that stay trainable."""
    found = _SPARED.fullmatch(pattern)
    return found[1] if found and is_one_group(found[1].removesuffix("$")) else None


def _read_frozen(text: str) -> list[str]:
    return strings(read_yaml(text)["frozen_res"])
