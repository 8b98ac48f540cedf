"""Apply a selection to a torch model by Axolotl's rules: train the selected parameters, freeze the rest."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import FreezeError, ResultError
from ..model.names import module_of
from ..model.wrappers import find_change, without_components
from ..selection.select import Selection
from . import axolotl
from .patterns import Names, PatternError

_MAX_SHOWN = 200


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

    A wrapped model is found by its inner names: torch.compile, DistributedDataParallel, FSDP with its original
    parameters, PEFT, or any other prefix that all names share.

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
    inner = _unwrap([name for name, _ in parameters], selection)
    texts = _patterns(selection, list(inner.values()))
    chosen: dict[str, Any] = {}
    for text, matched in zip(texts, _match(texts, parameters, inner), strict=True):
        if not matched and text not in axolotl.ALWAYS_PATTERNS:
            raise FreezeError(
                f"{text[:_MAX_SHOWN]!r} matches no parameter of the model",
                reason="no_match",
                hint="check that the selection is for this model",
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
        tuple(name for name, _ in parameters if name in chosen),
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


def _unwrap(names: list[str], selection: Selection | str | Path) -> dict[str, str]:
    """Return the name that the selection has for each parameter."""
    plain = {name: without_components(name) for name in names}
    if isinstance(selection, Selection):
        wanted = {*selection.result.parameters, *(m.parameter_name for m in selection.result.modules)}
    else:
        # Most entries are names of modules or parameters. The others do not show a prefix.
        wanted = {text.removeprefix("^").removesuffix("$") for text in axolotl.read_patterns(Path(selection))}
    own = dict.fromkeys([*plain.values(), *map(module_of, plain.values())])
    changed = find_change(own, wanted).apply_to_all(plain.values())
    inner = {name: changed.get(there, there) for name, there in plain.items()}
    taken = Counter(inner.values())
    # Two parameters never get one name.
    return {name: there if taken[there] == 1 else name for name, there in inner.items()}


def _match(
    texts: Sequence[str], parameters: list[tuple[str, Any]], inner: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the parameters that each of the patterns matches."""
    for text in texts:
        if axolotl.names_rows(text):
            raise FreezeError(
                f"{text[:_MAX_SHOWN]!r} selects rows of a parameter, but requires_grad trains whole parameters only",
                reason="row_range",
            )
    by_name = {inner[name]: (name, parameter) for name, parameter in parameters}
    names = Names(by_name)
    try:
        found = names.search([axolotl.entry_of(text) for text in texts])
    except PatternError as error:
        raise FreezeError(str(error), reason="bad_pattern") from error
    return (dict(by_name[name] for name in names.names_of(hits)) for hits in found)
