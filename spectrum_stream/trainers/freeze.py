"""Apply a selection to a torch model by Axolotl's rules: train the selected parameters, freeze the rest."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import FreezeError, ResultError
from ..selection.select import Selection
from . import axolotl


class _Model(Protocol):
    def named_parameters(self, *, remove_duplicate: bool) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Frozen:
    """The outcome of `freeze`.

    Attributes:
        trainable: names of the trainable parameters; a tied one under each name that was selected.
        trainable_count, total_count: numbers of weights; a tied one counts once.
    """

    trainable: tuple[str, ...]
    trainable_count: int
    total_count: int

    @property
    def trainable_share(self) -> float:
        return self.trainable_count / self.total_count


def freeze(model: _Model, selection: Selection | str | Path) -> Frozen:
    """Set `requires_grad` of every parameter: True only if the selection names it.

    Args:
        model: a torch module.
        selection: a `Selection`, or the path of a YAML file with `unfrozen_parameters`.

    Raises:
        FreezeError: no_match, a pattern matches no parameter (Spectrum's two for the head and the embedding may);
            all_frozen; row_range; bad_pattern; not_trainable. The model is unchanged then.
        ResultError: the file cannot be read.
    """
    # With duplicates, `^lm_head.weight$` finds a tied head, which the model lists under the embedding only.
    parameters = list(model.named_parameters(remove_duplicate=False))
    texts = _patterns(selection, [name for name, _ in parameters])
    chosen: dict[str, Any] = {}
    for text in texts:
        matched = _match(text, parameters)
        if not matched and text not in axolotl.ALWAYS_PATTERNS:
            raise FreezeError(
                f"{text!r} matches no parameter of the model",
                reason="no_match",
                hint="check that the selection is for this model, and that no wrapper prefixes its names",
            )
        chosen |= matched
    unique = {id(p): p for _, p in parameters}
    trainable = {id(p): p for p in chosen.values()}
    if not trainable:
        raise FreezeError("the selection would freeze all parameters", reason="all_frozen")
    if packed := [name for name, p in chosen.items() if not (p.is_floating_point() or p.is_complex())]:
        raise FreezeError(f"{packed[0]} holds integers, which have no gradient", reason="not_trainable")
    for key, parameter in unique.items():
        parameter.requires_grad = key in trainable
    return Frozen(
        tuple(chosen),
        sum(p.numel() for p in trainable.values()),
        sum(p.numel() for p in unique.values()),
    )


def _patterns(selection: Selection | str | Path, names: list[str]) -> tuple[str, ...]:
    if not isinstance(selection, Selection):
        return axolotl.read_patterns(Path(selection))
    try:
        return axolotl.patterns(selection, names)
    except ResultError as error:
        reasons = {"no_such_parameter": "no_match", "nothing_chosen": "all_frozen"}
        if error.reason not in reasons:
            raise
        raise FreezeError(str(error), reason=reasons[error.reason], hint=error.hint) from error


def _match(text: str, parameters: list[tuple[str, Any]]) -> dict[str, Any]:
    pattern = axolotl.Pattern(text)
    if pattern.names_rows:
        raise FreezeError(
            f"{text!r} selects rows of a parameter, but requires_grad trains whole parameters only",
            reason="row_range",
        )
    try:
        return {name: parameter for name, parameter in parameters if pattern.matches(name)}
    except (re.error, OverflowError, RecursionError) as error:
        raise FreezeError(f"{text!r} is not a regular expression: {error}", reason="bad_pattern") from error
