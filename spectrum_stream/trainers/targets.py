"""What every exporter starts from: a selection as the names of parameters, held against those that are known."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import ResultError
from ..results.result import Module
from ..selection.select import Selection
from .patterns import starting_with


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A chosen module as a trainer knows it.

    Attributes:
        module, group, value, rank_key: of the result, see `Module`.
        parameter: the name of what is trained, which for a tied head is its embedding's.
        certain: whether that name was read somewhere, and not made up from the module's.
        tied: whether it is another module's parameter.
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
        """Whether the parameter has the module's own name, as a bank of experts has."""
        return self.parameter == self.module


@dataclass(frozen=True, slots=True)
class Targets:
    """A selection as parameters.

    Attributes:
        chosen: first choice first, group after group.
        always: parameters that are trained whatever was chosen. Where not all names are known, the model need not
            have them.
        known: names of the model's parameters, sorted: all, or those that the result and its record have.
        complete: whether it is all.
    """

    chosen: tuple[Target, ...]
    always: tuple[str, ...]
    known: tuple[str, ...]
    complete: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """All that is to be trained, each once."""
        return tuple(dict.fromkeys((*self.always, *(target.parameter for target in self.chosen))))

    def starting_with(self, prefix: str) -> tuple[str, ...]:
        """The known names that start with a prefix."""
        return starting_with(self.known, prefix)


def targets_of(selection: Selection, names: Collection[str] | None) -> Targets:
    """The parameters of a selection.

    Args:
        names: all parameters of the model, by the trainer's names; None where only those of the result
            and its record are known.

    Raises:
        ResultError: no_such_parameter, a chosen module has none among `names`; nothing_chosen, there is nothing to
            train, which many trainers take for everything.
    """
    known = None if names is None else frozenset(names)
    lines = {line.name: line for line in selection.result.modules}
    chosen = []
    for group, modules in selection.chosen.items():
        for module in modules:
            parameter = _parameter(lines[module], lines, known)
            if parameter is None:
                raise ResultError(
                    f"the model has no parameter for {module}",
                    reason="no_such_parameter",
                    hint="are the names of another model, or of another version of transformers (--target)?",
                )
            line = lines[module]
            tied = line.owner != module and parameter != line.parameter_name
            certain = known is not None or line.parameter is not None
            chosen.append(
                Target(
                    module=module,
                    group=group,
                    value=line.value,
                    rank_key=line.rank_key,
                    parameter=parameter,
                    certain=certain,
                    tied=tied,
                )
            )
    always = []
    for module in selection.always:
        line = lines.get(module, Module(module, module, None))
        parameter = _parameter(line, lines, known)
        if parameter is not None:
            always.append(parameter)
    if not chosen and not always:
        raise ResultError("there is nothing to train", reason="nothing_chosen", hint="choose a larger share")
    alone = (line for line in selection.result.modules if line.owner == line.name or line.owner not in lines)
    return Targets(
        tuple(chosen),
        tuple(dict.fromkeys(always)),
        tuple(
            sorted(
                known
                if known is not None
                else {*selection.result.parameters, *(line.parameter_name for line in alone)}
            )
        ),
        known is not None,
    )


def _parameter(line: Module, lines: dict[str, Module], known: frozenset[str] | None) -> str | None:
    owner = lines.get(line.owner, line)
    if known is None:
        return owner.parameter_name
    # A list of names can have a tied parameter under one name or under both.
    likely = [line.parameter] if line.parameter else [f"{line.name}.weight", line.name]
    others = [] if owner is line else [owner.parameter_name]
    return next((name for name in (*likely, *others) if name in known), None)


def exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names, anchored at both ends, and no others."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})$"


def inexact(message: str, hint: str) -> ResultError:
    """That a dialect would train something else than what was chosen."""
    return ResultError(message, reason="inexact", hint=hint)


def needs_names(what: str) -> ResultError:
    return ResultError(
        f"{what} needs the names of all parameters of the model",
        reason="needs_names",
        hint="--names-from FILE, one name a line, as model.named_parameters() gives them",
    )
