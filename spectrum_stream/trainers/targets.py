"""A selection as parameters of the model, which is the start of every `render`."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..errors import ResultError
from ..results.result import Module
from ..selection.select import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A chosen module, by the names of the trainer.

    Attributes:
        module, group, value, rank_key: as in the result, see `Module`.
        parameter: the parameter to train; for a tied head, the parameter of the embedding.
        certain: whether its name comes from the model or the record, and is not guessed from the module.
        tied: whether it is the parameter of another module.
    """

    module: str
    group: str
    value: float | None
    rank_key: float
    parameter: str
    certain: bool
    tied: bool

    @property
    def is_bare(self) -> bool:
        """Whether the parameter has the name of the module itself, like fused experts."""
        return self.parameter == self.module


@dataclass(frozen=True, slots=True)
class Targets:
    """A selection as parameters.

    Attributes:
        chosen: first choice first, group after group.
        always: parameters to train whatever was chosen. Unless `complete`, the model may lack them.
        names: parameters of the model, sorted: all of them, or those of the result and its record.
        complete: whether `names` is all of them.
    """

    chosen: tuple[Target, ...]
    always: tuple[str, ...]
    names: tuple[str, ...]
    complete: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters to train, each once."""
        return tuple(dict.fromkeys((*self.always, *(target.parameter for target in self.chosen))))

    def starting_with(self, prefix: str) -> Iterator[str]:
        """Yield the names that start with a prefix; the first few are often enough."""
        for at in range(bisect_left(self.names, prefix), len(self.names)):
            if not self.names[at].startswith(prefix):
                return
            yield self.names[at]


def targets_of(selection: Selection, names: Collection[str] | None) -> Targets:
    """Find the parameters of a selection.

    Args:
        names: all parameters of the model in the trainer; None if only the result and its record are known.

    Raises:
        ResultError: no_such_parameter, `names` has none for a chosen module; nothing_chosen, there is nothing to
            train, and many trainers would then train all parameters.
    """
    given = None if names is None else frozenset(names)
    by_name = {module.name: module for module in selection.result.modules}
    chosen = [_target(by_name[name], by_name, given) for name in selection.chosen_names]
    always = (_parameter(by_name.get(name, Module(name, name, None)), by_name, given) for name in selection.always)
    found = tuple(dict.fromkeys(name for name in always if name is not None))
    if not chosen and not found:
        raise ResultError("there is nothing to train", reason="nothing_chosen", hint="choose a larger share")
    if given is not None:
        return Targets(tuple(chosen), found, tuple(sorted(given)), True)
    own = (module for module in by_name.values() if module.owner == module.name or module.owner not in by_name)
    seen = {*selection.result.parameters, *(module.parameter_name for module in own)}
    return Targets(tuple(chosen), found, tuple(sorted(seen)), False)


def _target(module: Module, by_name: dict[str, Module], given: frozenset[str] | None) -> Target:
    parameter = _parameter(module, by_name, given)
    if parameter is None:
        raise ResultError(
            f"the model has no parameter for {module.name}",
            reason="no_such_parameter",
            hint="check that the names are of the scanned model, and of the same version of transformers (--names)",
        )
    return Target(
        module=module.name,
        group=module.group,
        value=module.value,
        rank_key=module.rank_key,
        parameter=parameter,
        certain=given is not None or module.parameter is not None,
        tied=module.owner != module.name and parameter != module.parameter_name,
    )


def _parameter(module: Module, by_name: dict[str, Module], given: frozenset[str] | None) -> str | None:
    owner = by_name.get(module.owner, module)
    if given is None:
        return owner.parameter_name
    # A list of names can have a tied parameter under one name or under both.
    likely = [module.parameter] if module.parameter else [f"{module.name}.weight", module.name]
    others = [] if owner is module else [owner.parameter_name]
    return next((name for name in (*likely, *others) if name in given), None)


def exactly(names: Iterable[str]) -> str:
    """Return an anchored regular expression that matches exactly these names."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def inexact(message: str, hint: str) -> ResultError:
    """Return the error of a format that would not train exactly the choice."""
    return ResultError(message, reason="inexact", hint=hint)


def needs_names(subject: str) -> ResultError:
    """Return the error of a format that must know all parameters of the model."""
    return ResultError(
        f"{subject} needs the names of all parameters of the model",
        reason="needs_names",
        hint="pass --names FILE with the names of model.named_parameters(), one per line",
    )
