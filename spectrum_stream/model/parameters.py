"""Names in memory: what transformers calls the parameter that a stored tensor becomes.

They differ from the checkpoint's in many families: transformers 5 fuses the experts of a layer, and moves the parts
of vision-language models. A pattern with the checkpoint's name then trains nothing. What becomes of the names is data
for the families that are known (`families`). For others transformers itself is asked: the model is built from its
config without weights, and each stored name goes the way that it goes when it is loaded. That needs the extra
`verify`; no code from a repo is run.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import families
from .matrix import Matrix, NoScore, Skipped
from .names import fused_name_of, group_of, is_extra_layer, layer_count, module_of
from .quantization import parameter_of
from .transformers_names import _unknown, installed_version, parameter_names


class Target(StrEnum):
    """Whose names results have."""

    AUTO = "auto"  # of the transformers that is installed, or of the checkpoint where none is
    CHECKPOINT = "checkpoint"
    V4 = "transformers-v4"
    V5 = "transformers-v5"


# Whose names a list has that was given.
GIVEN = "given"


@dataclass(frozen=True, slots=True)
class Named:
    """Matrices by the names of their parameters.

    Attributes:
        target: whose names they are, a `Target` or GIVEN.
        not_loaded: those that the model leaves out.
        warnings: what is odd about the names, a sentence each.
        parameters: what each stored weight becomes, or a part of it; None where names are the checkpoint's.
    """

    matrices: tuple[Matrix, ...]
    target: str
    not_loaded: tuple[Matrix, ...]
    warnings: tuple[str, ...]
    parameters: Mapping[str, str] | None = None

    def name_of(self, s: Skipped) -> str | None:
        """What a tensor that was skipped is called, or is a part of; None for what the model does not have."""
        return parameter_of(s.tensor) if self.parameters is None else self.parameters.get(_stands_for(s))


def named(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    config: Mapping[str, Any],
    target: Target,
    names: Sequence[str] | None = None,
) -> Named:
    """The matrices by the names that their parameters have in a trainer.

    A parameter of which a part has no score has none as a whole; the other parts keep the checkpoint's names.

    Args:
        names: of all parameters in a trainer, which then decide.

    Raises:
        UsageError: missing_extra, unknown_architecture, where a `target` that was asked for cannot be told;
            no_such_name.
    """
    family, asked = config.get("model_type"), target
    stored = list(dict.fromkeys([*(w.parameter for w in matrices), *map(_stands_for, skipped)]))
    if names is not None:
        return _renamed(matrices, skipped, _among(names, stored, family), GIVEN, layer_count(config), [])
    if target is Target.AUTO:
        # Of a family that nobody names nothing is known.
        target = _installed_target() if isinstance(family, str) else Target.CHECKPOINT
    if target is Target.CHECKPOINT:
        return Named(tuple(matrices), target, (), ())
    warnings: list[str] = []
    if (rename := _by_table(family, target)) is not None:
        parameters = {name: rename(name) for name in stored}
    else:
        try:
            if target is Target.V4:
                raise _unknown(str(family))
            parameters = parameter_names(config, stored)
        except UsageError:
            if asked is not Target.AUTO:
                raise
            warnings.append(f"{family} is no family whose names in memory are known here; these are the checkpoint's")
            return Named(tuple(matrices), Target.CHECKPOINT, (), tuple(warnings))
    return _renamed(matrices, skipped, parameters, target, layer_count(config), warnings)


@dataclass(frozen=True, slots=True)
class Renaming:
    """What becomes of the names of a checkpoint, and whose they then are, in words."""

    of: Callable[[str], str]
    whose: str


def renaming(config: Mapping[str, Any], target: Target) -> Renaming:
    """That of a family that is known; else the checkpoint's names stay."""
    target = _installed_target() if target is Target.AUTO else target
    rename = _by_table(config.get("model_type"), target)
    if rename is None:
        return Renaming(str, "of the checkpoint")
    return Renaming(rename, f"of the checkpoint, as {target.replace('-v', ' ')} renames them")


def _by_table(family: object, target: Target) -> Callable[[str], str] | None:
    """What becomes of the names of a family that is known; None for another."""
    table = {Target.V4: families.V4, Target.V5: families.V5}.get(target, {})
    return families.rename(table[family]) if isinstance(family, str) and family in table else None


def _installed_target() -> Target:
    return {4: Target.V4, 5: Target.V5}.get(installed_version() or 0, Target.CHECKPOINT)


def _renamed(
    matrices: Sequence[Matrix],
    skipped: Sequence[Skipped],
    parameters: Mapping[str, str],
    target: str,
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
        if is_extra_layer(w.module, layers) and target != GIVEN:
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
    return Named(tuple(kept), target, tuple(not_loaded), tuple(warnings), parameters)


def _stands_for(s: Skipped) -> str:
    """The parameter that was skipped; of experts that are not there, one of them."""
    owner, _, projection = s.tensor.rpartition(".")
    return f"{owner}.0.{projection}.weight" if s.why is NoScore.MISSING_EXPERTS else parameter_of(s.tensor)


# What wrappers put into the names of the parameters that they wrap.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)(?=\.)|^module\.|^base_model\.model\."
)


def _among(names: Sequence[str], stored: Sequence[str], family: object) -> dict[str, str]:
    """Each stored name's among those of a trainer, by the renaming that finds the most of them."""
    plain: dict[str, str] = {}
    for name in names:
        short = name
        while (shorter := _WRAPPERS.sub("", short).lstrip(".")) != short:
            short = shorter
        plain[short] = name
    rules = [(), *(t[family] for t in (families.V5, families.V4) if isinstance(family, str) and family in t)]
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
