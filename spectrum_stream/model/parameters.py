"""Name matrices as the trainer names its parameters.

transformers renames tensors when it loads them: version 5 fuses the experts of a layer and moves the parts of
vision-language models. A pattern with the name from the checkpoint then trains nothing. The renamings of known
families are data (`families`), so that results do not depend on the installed packages. Only `Names.INSTALLED` uses
the installed transformers. It needs the extra `verify` and runs no code from a repo.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

from ..errors import UsageError
from ..text import listed
from . import families
from .config import ModelConfig
from .matrix import Matrix, Skipped
from .names import fused_name_of, group_of, is_extra_layer, module_of
from .no_score import NoScore
from .schemes import parameter_of
from .transformers_names import find_parameter_names


class Names(StrEnum):
    """The names that results use."""

    CHECKPOINT = "checkpoint"  # as stored
    V4 = "transformers-v4"  # as transformers 4 names parameters after loading, by the table of families
    V5 = "transformers-v5"  # the same for transformers 5
    INSTALLED = "transformers"  # as the installed transformers names them


# The `names` of a plan that follows a list of the trainer's own names.
GIVEN = "given"
_TABLES: Mapping[Names, Mapping[str, families.Rules]] = {Names.V4: families.V4, Names.V5: families.V5}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedMatrices:
    """Matrices by the names of their parameters.

    Attributes:
        names: the names that were established, one of `Names` or GIVEN.
        names_sha256: a hash of a given list, or of the names in the installed transformers; None if `names`
            determines them.
        not_loaded: matrices that the model leaves out.
        warnings: one sentence for each oddity of the names.
        parameters: the parameter that each stored name becomes, or becomes a part of; None for the names of the
            checkpoint.
    """

    matrices: tuple[Matrix, ...]
    names: str
    names_sha256: str | None = None
    not_loaded: tuple[Matrix, ...] = ()
    warnings: tuple[str, ...] = ()
    parameters: Mapping[str, str] | None = None

    def find_parameter(self, s: Skipped) -> str | None:
        """Find the parameter that a skipped tensor is, or is a part of.

        The result is None if the model does not have it.
        """
        return parameter_of(s.tensor) if self.parameters is None else self.parameters.get(_stored_name_of(s))


def parse_names(names: Names | str | Sequence[str]) -> Names | tuple[str, ...]:
    """Parse the argument `names` of `plan`.

    It is a member of `Names`, its value, or a list of the trainer's own names.

    Raises:
        UsageError: no_such_names, for a string that is not a value of `Names`.
    """
    if not isinstance(names, str):
        return tuple(names)
    if names not in list(Names):
        raise UsageError(
            f"unknown names {names!r}", reason="no_such_names", hint=f"use one of {', '.join(Names)}, or a list"
        )
    return Names(names)


def name_parameters(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    config: ModelConfig,
    names: Names | Sequence[str],
) -> NamedMatrices:
    """Give matrices the names that their parameters have in a trainer.

    If a part of a parameter has no score, the parameter has none, and its other parts keep the names of the
    checkpoint. An unknown family keeps them too, with a warning.

    Args:
        names: a member of `Names`, or the names of all parameters in a trainer.

    Raises:
        UsageError: no_such_name, no given name belongs to the checkpoint; missing_extra, unknown_architecture, the
            installed transformers does not have the names.
    """
    family, layers = config.model_type, config.layer_count
    stored = list(dict.fromkeys([*(w.parameter for w in matrices), *map(_stored_name_of, skipped)]))
    if not isinstance(names, Names):
        found = _rename_matrices(matrices, skipped, _match_names(names, stored, family), GIVEN, layers)
        return replace(found, names_sha256=_hash_names(names))
    if names is Names.CHECKPOINT:
        return NamedMatrices(matrices=tuple(matrices), names=names)
    if names is Names.INSTALLED:
        parameters = find_parameter_names(config, stored)
        found = _rename_matrices(matrices, skipped, parameters, names, layers)
        return replace(found, names_sha256=_hash_names(parameters.values()))
    rename = _find_rules(family, names)
    if rename is None:
        return NamedMatrices(
            matrices=tuple(matrices), names=Names.CHECKPOINT, warnings=(_warn_of_family(family, names),)
        )
    return _rename_matrices(matrices, skipped, {name: rename(name) for name in stored}, names, layers)


def _warn_of_family(family: str | None, names: Names) -> str:
    what = f"the family {family[:100]!r}" if family is not None else "a config.json without a model_type"
    return (
        f"the names of {names} are not known for {what}, so the names of the checkpoint are used; "
        f"--names {Names.INSTALLED} gets them from the installed transformers"
    )


def _hash_names(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(names))).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Renaming:
    """A function from names in the checkpoint to names of parameters.

    `origin` is the origin of the names in words, a noun phrase. `warning` is a sentence for an unknown family, which
    keeps the names of the checkpoint.
    """

    of: Callable[[str], str]
    origin: str
    warning: str | None = None


def renaming(config: ModelConfig, names: Names) -> Renaming:
    """Return the renaming of a known family, or the identity."""
    rename = _find_rules(config.model_type, names)
    if rename is None:
        is_asked = names is Names.CHECKPOINT
        return Renaming(str, "the checkpoint", None if is_asked else _warn_of_family(config.model_type, names))
    return Renaming(rename, f"the checkpoint, as {names.replace('-v', ' ')} renames them")


def _find_rules(family: str | None, names: Names) -> Callable[[str], str] | None:
    """Return the renaming of a known family, or None."""
    table = _TABLES.get(names, {})
    return families.compile_rules(table[family]) if family is not None and family in table else None


def _rename_matrices(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    parameters: Mapping[str, str],
    names: str,
    layers: int | None,
) -> NamedMatrices:
    """Give each matrix its parameter, unless a part of that parameter has no score.

    Args:
        parameters: the parameter that each stored name becomes, or becomes a part of.
    """
    incomplete = {parameters.get(_stored_name_of(s)) for s in skipped if s.no_score.is_failure}
    missing = {s.tensor for s in skipped if s.no_score is NoScore.MISSING_EXPERTS}
    incomplete |= {parameters.get(w.parameter) for w in matrices if fused_name_of(w.module) in missing}
    kept: list[Matrix] = []
    not_loaded: list[Matrix] = []
    unknown: dict[str, None] = {}
    for w in matrices:
        parameter = parameters.get(w.parameter)
        if is_extra_layer(w.module, layers) and names != GIVEN:
            not_loaded.append(w)
        elif w.tied_to is not None and parameter is None:
            kept.append(w)
        elif parameter is None or parameter in incomplete:
            kept.append(w)
            unknown[w.result_name] = None
        elif parameter == w.parameter:
            kept.append(w)
        else:
            # The group of another tower or of an extra layer keeps its prefix.
            prefix = w.group.removesuffix(group_of(w.result_name))
            kept.append(replace(w, group=prefix + group_of(module_of(parameter)), parameter=parameter))
    warnings = []
    if unknown:
        some = listed(list(unknown), 5)
        warnings.append(f"these modules have no parameter in the model, so they keep the checkpoint's names: {some}")
    return NamedMatrices(
        matrices=tuple(kept),
        names=names,
        not_loaded=tuple(not_loaded),
        warnings=tuple(warnings),
        parameters=parameters,
    )


def _stored_name_of(s: Skipped) -> str:
    """Return the stored name of a skipped parameter, or of the first missing expert."""
    owner, _, projection = s.tensor.rpartition(".")
    return f"{owner}.0.{projection}.weight" if s.no_score is NoScore.MISSING_EXPERTS else parameter_of(s.tensor)


# The components that wrappers add to the names of the parameters that they wrap.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)(?=\.)|^module\.|^base_model\.model\."
)
_PREFIXES = ("model.", "transformer.", "language_model.")


def _match_names(names: Sequence[str], stored: Sequence[str], family: str | None) -> dict[str, str]:
    """Find each stored name among the names in a trainer.

    A trainer's model can be wrapped, and can be a part of the checkpoint's model or contain it. So every renaming of
    the family is tried with every prefix added or removed, and the combination that finds the most names wins. All
    names get the same one, because two tensors must not become one parameter unless the family fuses them.

    Raises:
        UsageError: no_such_name, nothing is found.
    """
    given = {_unwrap(name): name for name in names}
    rules = [(), *(t[family] for t in (families.V5, families.V4) if family is not None and family in t)]
    changes: list[Callable[[str], str]] = [lambda name: name]
    for prefix in _PREFIXES:
        changes += [partial(_add_prefix, prefix), partial(_remove_prefix, prefix)]
    best: dict[str, str] = {}
    for rename in map(families.compile_rules, rules):
        for change in changes:
            found = {name: given[there] for name in stored if (there := change(rename(name))) in given}
            best = found if len(found) > len(best) else best
    if not best:
        raise UsageError(
            "no name in the list belongs to a weight of the checkpoint",
            reason="no_such_name",
            hint="print the names with: for name, _ in model.named_parameters(): print(name)",
        )
    return best


def _unwrap(name: str) -> str:
    """Remove the components of wrappers from a name, however deep they are nested."""
    while (shorter := _WRAPPERS.sub("", name).lstrip(".")) != name:
        name = shorter
    return name


def _add_prefix(prefix: str, name: str) -> str:
    return prefix + name


def _remove_prefix(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of parameters from a file: one a line, or a JSON list.

    The part of a line after a space is ignored.

    Raises:
        UsageError: no_such_file, no_names.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a list of names", reason="no_such_file") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = [words[0] for line in text.splitlines() if (words := line.split())]
    if not isinstance(data, list) or not data or not all(isinstance(name, str) for name in data):
        raise UsageError(
            f"{path} does not hold a list of names", reason="no_names", hint="write one name a line, or a JSON list"
        )
    return tuple(data)
