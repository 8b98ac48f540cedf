"""Apply a selection to a model: train what it names and freeze the rest, by Axolotl's rules."""

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
    """What `freeze` did.

    Attributes:
        trainable: names of the parameters left trainable.
        trainable_count, total_count: numbers of weights; a tied one counts once.
    """

    trainable: tuple[str, ...]
    trainable_count: int
    total_count: int

    @property
    def trainable_share(self) -> float:
        return self.trainable_count / self.total_count


def freeze(model: _Model, selection: Selection | str | Path) -> Frozen:
    """Set `requires_grad` on every parameter of a model: True where the selection names it, else False.

    Args:
        model: a torch module.
        selection: a `Selection`, or the path of a YAML file with `unfrozen_parameters`.

    Raises:
        FreezeError: no_match, a pattern fits no parameter (the two that Spectrum always writes, for the head
            and the embedding, may); all_frozen; row_range; bad_pattern; not_trainable. The model is then as it was.
        ResultError: the file cannot be read.
    """
    # With duplicates: a tied head is listed under its own name too, and `^lm_head.weight$` finds it there.
    parameters = list(model.named_parameters(remove_duplicate=False))
    texts = _patterns(selection, [name for name, _ in parameters])
    chosen: dict[str, Any] = {}
    for text in texts:
        matched = _match(text, parameters)
        if not matched and text not in axolotl.ALWAYS:
            raise FreezeError(
                f"{text!r} matches no parameter of the model",
                reason="no_match",
                hint="is the selection of another model, or are its names prefixed?",
            )
        chosen |= matched
    unique = {id(p): p for _, p in parameters}
    trainable = {id(p): p for p in chosen.values()}
    if not trainable:
        raise FreezeError("the selection would leave nothing to train", reason="all_frozen")
    if packed := [name for name, p in chosen.items() if not (p.is_floating_point() or p.is_complex())]:
        raise FreezeError(f"{packed[0]} holds integers and cannot be trained", reason="not_trainable")
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
            f"{text!r} names rows of a parameter; requires_grad can only train a whole one",
            reason="row_range",
        )
    try:
        return {name: parameter for name, parameter in parameters if pattern.matches(name)}
    except (re.error, OverflowError, RecursionError) as error:
        raise FreezeError(f"{text!r} is not a regular expression: {error}", reason="bad_pattern") from error
