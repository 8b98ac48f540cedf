"""Name matrices as the trainer names its parameters.

transformers renames tensors when it loads them: version 5 fuses the experts of a layer and moves the parts of
vision-language models. A pattern with the name from the checkpoint then trains nothing. The renamings of known
families are data (`families`), so that results do not depend on the installed packages. Only `Names.INSTALLED` asks
the installed transformers, which needs the extra `verify` and runs no code from a repo.
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
from . import families
from .config import ModelConfig
from .matrix import Matrix, NoScore, Skipped
from .names import fused_name_of, group_of, is_extra_layer, module_of
from .quantization import parameter_of
from .transformers_names import parameter_names


class Names(StrEnum):
    """The names that results use."""

    CHECKPOINT = "checkpoint"  # as stored
    V4 = "transformers-v4"  # as transformers 4 names parameters after loading, by the table of families
    V5 = "transformers-v5"  # the same for transformers 5
    INSTALLED = "transformers"  # as the installed transformers names them


# The `names` of a plan that follows a list of the trainer's own names.
GIVEN = "given"
_TABLES: Mapping[Names, Mapping[str, families.Rules]] = {Names.V4: families.V4, Names.V5: families.V5}


@dataclass(frozen=True, slots=True)
class Named:
    """Matrices by the names of their parameters.

    Attributes:
        names: the names that were really established, a `Names` or GIVEN.
        names_sha256: a hash of the names where `names` does not determine them: of a list that was given, or of
            the answer of the installed transformers.
        not_loaded: those that the model leaves out.
        warnings: what is odd about the names, a sentence each.
        parameters: what each stored weight becomes, or a part of it; None where names are the checkpoint's.
    """

    matrices: tuple[Matrix, ...]
    names: str
    not_loaded: tuple[Matrix, ...] = ()
    warnings: tuple[str, ...] = ()
    parameters: Mapping[str, str] | None = None
    names_sha256: str | None = None

    def name_of(self, s: Skipped) -> str | None:
        """What a tensor that was skipped is called, or is a part of; None for what the model does not have."""
        return parameter_of(s.tensor) if self.parameters is None else self.parameters.get(_stands_for(s))


def parse_names(names: Names | str | Sequence[str]) -> Names | tuple[str, ...]:
    """Turn the argument of `plan` into a member of `Names` or a list of the trainer's own names.

    Raises:
        UsageError: no_such_names, for a text that is not a value of `Names`.
    """
    if not isinstance(names, str):
        return tuple(names)
    if names not in list(Names):
        raise UsageError(
            f"unknown names {names!r}", reason="no_such_names", hint=f"use one of {', '.join(Names)}, or a list"
        )
    return Names(names)


def named(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    config: ModelConfig,
    names: Names | Sequence[str],
) -> Named:
    """Give matrices the names that their parameters have in a trainer.

    A parameter of which a part has no score has none as a whole; the other parts keep the names of the checkpoint.
    An unknown family keeps them too, with a warning.

    Args:
        names: a member of `Names`, or the names of all parameters in a trainer.

    Raises:
        UsageError: no_such_name, no given name belongs to the checkpoint; missing_extra, unknown_architecture, the
            installed transformers cannot tell the names.
    """
    family, layers = config.model_type, config.layer_count
    stored = list(dict.fromkeys([*(w.parameter for w in matrices), *map(_stands_for, skipped)]))
    if not isinstance(names, Names):
        found = _renamed(matrices, skipped, _among(names, stored, family), GIVEN, layers, [])
        return replace(found, names_sha256=_sha256(names))
    if names is Names.CHECKPOINT:
        return Named(tuple(matrices), names)
    if names is Names.INSTALLED:
        parameters = parameter_names(config, stored)
        found = _renamed(matrices, skipped, parameters, names, layers, [])
        return replace(found, names_sha256=_sha256(parameters.values()))
    rename = _by_table(family, names)
    if rename is None:
        what = f"the family {family[:100]!r}" if family is not None else "a config.json without a model_type"
        warning = (
            f"the names of {names} are not known for {what}, so the names of the checkpoint are used; "
            f"--names {Names.INSTALLED} asks the installed transformers"
        )
        return Named(tuple(matrices), Names.CHECKPOINT, warnings=(warning,))
    return _renamed(matrices, skipped, {name: rename(name) for name in stored}, names, layers, [])


def _sha256(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(names))).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Renaming:
    """What becomes of the names of a checkpoint, and whose they then are, in words."""

    of: Callable[[str], str]
    whose: str


def renaming(config: ModelConfig, names: Names) -> Renaming:
    """Return the renaming of a known family, or the identity."""
    rename = _by_table(config.model_type, names)
    if rename is None:
        return Renaming(str, "of the checkpoint")
    return Renaming(rename, f"of the checkpoint, as {names.replace('-v', ' ')} renames them")


def _by_table(family: str | None, names: Names) -> Callable[[str], str] | None:
    """Return the renaming of a known family, or None."""
    table = _TABLES.get(names, {})
    return families.rename(table[family]) if family is not None and family in table else None


def _renamed(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    parameters: Mapping[str, str],
    names: str,
    layers: int | None,
    warnings: list[str],
) -> Named:
    incomplete = {parameters.get(_stands_for(s)) for s in skipped if s.why.is_failure}
    short = {s.tensor for s in skipped if s.why is NoScore.MISSING_EXPERTS}
    incomplete |= {parameters.get(w.parameter) for w in matrices if fused_name_of(w.module) in short}
    kept: list[Matrix] = []
    not_loaded: list[Matrix] = []
    unknown: dict[str, None] = {}
    for w in matrices:
        parameter = parameters.get(w.parameter)
        if is_extra_layer(w.module, layers) and names != GIVEN:
            not_loaded.append(w)
        elif w.tied_to is not None or (parameter == w.parameter and parameter not in incomplete):
            kept.append(w)
        elif parameter is None or parameter in incomplete:
            kept.append(w)
            unknown[w.result_name] = None
        else:
            # The tower of a group, or what else it is kept apart by, is in front of the name.
            apart = w.group.removesuffix(group_of(w.result_name))
            group = group_of(module_of(parameter))
            kept.append(replace(w, group=apart + group, parameter=parameter))
    if unknown:
        some = ", ".join(list(unknown)[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        warnings.append(f"not among the parameters of the model, and named as in the checkpoint: {some}")
    return Named(tuple(kept), names, tuple(not_loaded), tuple(warnings), parameters)


def _stands_for(s: Skipped) -> str:
    """The parameter that was skipped; of experts that are not there, one of them."""
    owner, _, projection = s.tensor.rpartition(".")
    return f"{owner}.0.{projection}.weight" if s.why is NoScore.MISSING_EXPERTS else parameter_of(s.tensor)


# What wrappers put into the names of the parameters that they wrap.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)(?=\.)|^module\.|^base_model\.model\."
)


def _among(names: Sequence[str], stored: Sequence[str], family: str | None) -> dict[str, str]:
    """Each stored name's among those of a trainer, by the renaming that finds the most of them."""
    plain: dict[str, str] = {}
    for name in names:
        short = name
        while (shorter := _WRAPPERS.sub("", short).lstrip(".")) != short:
            short = shorter
        plain[short] = name
    rules = [(), *(t[family] for t in (families.V5, families.V4) if family is not None and family in t)]
    best: dict[str, str] = {}
    # One and the same for all: two tensors must not become one parameter, unless the family fuses them.
    fetches: list[Callable[[str], str]] = [lambda name: name]
    for prefix in ("model.", "transformer.", "language_model."):
        fetches += [partial(str.__add__, prefix), partial(_without, prefix)]
    for rename in map(families.rename, rules):
        for way in fetches:
            found = {name: plain[there] for name in stored if (there := way(rename(name))) in plain}
            best = found if len(found) > len(best) else best
    if not best:
        raise UsageError("none of the names given is one of this checkpoint's weights", reason="no_such_name")
    return best


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def read_names(path: Path) -> tuple[str, ...]:
    """Names of parameters, one a line, what follows a space left out; or a JSON list of them.

    Raises:
        UsageError: no_such_file, no_names.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as names of parameters", reason="no_such_file") from error
    try:
        data = json.loads(text)
    except ValueError:
        data = [words[0] for line in text.splitlines() if (words := line.split())]
    if not isinstance(data, list) or not data or not all(isinstance(name, str) for name in data):
        raise UsageError(f"{path} holds no list of names", reason="no_names")
    return tuple(data)
