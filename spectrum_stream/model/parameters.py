"""Name matrices as the trainer names its parameters.

transformers renames tensors when it loads them: it adds or removes the prefix of the base model, version 5 fuses the
experts of a layer and moves the parts of vision-language models. A pattern with the name from the checkpoint then
trains nothing. The renamings of known families (`families`) and the names of their parameters (`family_names`) are
data, so that results do not depend on the installed packages. Names count as established only if the family has them.
Only `Names.INSTALLED` uses the installed transformers. It needs the extra `verify` and runs no code from a repo.
"""

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

from ..errors import UsageError
from ..files import MAX_JSON_VALUES, FileKind, JsonTooLarge, above_limit, parse_json, read_file
from ..text import counted, listed
from . import families
from .config import ModelConfig
from .family_names import Family, ModelClass, find_family
from .matrix import Matrix, Skipped
from .names import (
    MAX_NAME_LENGTH,
    fused_name_of,
    group_of,
    is_extra_layer,
    is_fused_experts,
    is_head,
    is_weight,
    module_of,
)
from .no_score import NoScore
from .schemes import parameter_of
from .ties import can_be_tied
from .transformers_names import BuiltModel, InstalledModel
from .wrappers import find_change, remove_known_wrappers, remove_wrappers, without_components


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
class Naming:
    """The parameters that the tensors of a checkpoint become.

    Attributes:
        names: the names that were established, one of `Names` or GIVEN; CHECKPOINT if none were.
        parameters: the parameter that each stored name becomes, or becomes a part of.
        not_loaded: stored names that the model leaves out.
        unknown: stored names of weights that the model does not have; they keep the checkpoint's names.
        model_class: the class of transformers that has the names; None if it is not known.
        is_established: whether every weight has the name that was asked for.
        built: the model that the installed transformers builds, if it was asked for.
        plain: the names of parameters in a trainer without its wrappers; empty for other names.
        warnings: one sentence for each oddity of the names.
    """

    names: str
    parameters: Mapping[str, str]
    not_loaded: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    model_class: str | None = None
    is_established: bool = True
    built: BuiltModel | None = None
    plain: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def find_group(self, parameter: str) -> str:
        """Find the group of a parameter. In `0.auto_model.layers.3.mlp`, the first number is not a layer."""
        plain = module_of(self.plain.get(parameter, parameter))
        return group if (group := group_of(plain)) != plain else group_of(module_of(parameter))


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedMatrices:
    """Matrices by the names of their parameters.

    Attributes:
        naming: the names of all stored tensors.
        names_sha256: a hash of a given list, or of the names in the installed transformers; None if `naming.names`
            determines them.
        not_loaded: matrices that the model leaves out.
        warnings: one sentence for each oddity of the names.
    """

    matrices: tuple[Matrix, ...]
    naming: Naming
    names_sha256: str | None = None
    not_loaded: tuple[Matrix, ...] = ()
    warnings: tuple[str, ...] = ()

    def find_parameter(self, s: Skipped) -> str | None:
        """Find the parameter that a skipped tensor is, or is a part of.

        The result is None if the model does not have it.
        """
        return self.naming.parameters.get(_stored_name_of(s))


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
    weights = list(dict.fromkeys(w.parameter for w in matrices if w.tied_to is None))
    shared = [w.parameter for w in matrices if w.tied_to is not None]
    others = map(_stored_name_of, skipped)
    rows = max((max(w.n, w.m, (w.expert or 0) + 1) for w in matrices), default=0)
    naming = find_naming(config, names, [*weights, *shared, *others], weights, shared, rows=rows)
    found = _rename_matrices(matrices, skipped, naming)
    if not isinstance(names, Names):
        return replace(found, names_sha256=_hash_names(names))
    if names is Names.INSTALLED:
        return replace(found, names_sha256=_hash_names(naming.parameters.values()))
    return found


def find_naming(
    config: ModelConfig,
    names: Names | Sequence[str],
    stored: Iterable[str],
    weights: Sequence[str] | None = None,
    shared: Collection[str] = (),
    *,
    rows: int = 0,
) -> Naming:
    """Find the parameters that the tensors of a checkpoint become.

    Args:
        names: a member of `Names`, or the names of all parameters in a trainer.
        stored: the names of the tensors, in the order of the checkpoint; packed weights by `parameter_of`.
        weights: those of them that must be parameters of the model; default: all that end in `.weight`.
        shared: those of them that share a parameter, such as a tied head; they get a name if the model has one.
        rows: the largest dimension of a tensor. It limits the model that transformers builds.

    Raises:
        UsageError: as `name_parameters`.
    """
    stored = list(dict.fromkeys(stored))
    if weights is None:
        weights = [name for name in stored if is_weight(name) and name not in shared]
    if not isinstance(names, Names):
        return _match_names(names, stored, weights, config.model_type)
    if names is Names.CHECKPOINT:
        return Naming(names=names, parameters=dict(zip(stored, stored, strict=True)))
    kind, family = config.model_type, find_family(config)
    if names is Names.INSTALLED:
        with InstalledModel(config, len(stored), rows) as model:
            built = model.built
            model_class = None if family is None else family.classes.get(built.class_name)
            unloaded = _Unloaded(
                family=family,
                model_class=model_class,
                shared=shared,
                find_owner=built.tied.get,
                is_tied=can_be_tied(config),
            )
            # One request for all names is faster than one for each.
            model.find([*stored, *map(without_components, weights)])
            naming = replace(_load(stored, weights, config.layer_count, model.find, unloaded), built=built)
        if 2 * len(naming.unknown) > len(weights) or _loads_nothing(naming, weights):
            kept = _keep_names(stored, weights, _warn_of_misfit(naming, weights, built.class_name, names))
            return replace(kept, built=built)
        return replace(_leave_out_unknown(naming, built.class_name), names=names, model_class=built.class_name)
    table = _TABLES[names]
    if family is None or kind is None or kind not in table:
        return _keep_names(stored, weights, _warn_of_family(kind, names, has_config=bool(config.data)))
    if config.architectures and family.find_class(config) is None:
        return _keep_names(stored, weights, _warn_of_class(config, names))
    model_class, warnings = _find_class(family, config, weights)
    rename = rename_in_v4 = families.compile_rules(families.V5[kind])
    if table[kind] != families.V5[kind]:
        rename_in_v4 = families.compile_rules(table[kind])

    @cache
    def find_one(name: str) -> tuple[str, str] | None:
        parameter = model_class.find(renamed := rename(name))
        return None if parameter is None else (renamed, _move_prefix(renamed, parameter, rename_in_v4(name)))

    def find(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
        return {name: found for name in tensors if (found := find_one(name)) is not None}

    unloaded = _Unloaded(
        family=family,
        model_class=model_class,
        shared=shared,
        find_owner=model_class.find_owner,
        rename=rename,
        is_tied=can_be_tied(config),
    )
    naming = _load(stored, weights, config.layer_count, find, unloaded)
    if 2 * len(naming.unknown) > len(weights) or _loads_nothing(naming, weights):
        return _keep_names(stored, weights, _warn_of_misfit(naming, weights, model_class.name, names))
    # Code of the repo can name its parameters as it stores them, or as transformers does.
    if config.has_code and any(naming.parameters.get(name) != name for name in weights):
        return _keep_names(stored, weights, _warn_of_code(model_class.name))
    return replace(naming, names=names, model_class=model_class.name, warnings=(*warnings, *naming.warnings))


def _find_class(family: Family, config: ModelConfig, weights: Iterable[str]) -> tuple[ModelClass, list[str]]:
    """Find the class that a trainer loads, and warn where another one is as likely."""
    found = family.find_class(config)
    if found is None:
        rename = families.compile_rules(families.V5[config.model_type or ""])
        guessed = family.guess_class(rename(without_components(name)) for name in weights)
        return guessed, [f"config.json has no architectures, so the names are those of {guessed.name}"]
    if (base := find_base_model(config)) is not None:
        return found, [
            f"config.json names {found.name}; in a trainer that loads {base.causal}, as Axolotl does, the names have "
            f"the prefix `{base.prefix}`: give them with --names FILE"
        ]
    return found, []


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A config.json that names a base model, `Qwen3Model`, in a family of causal models.

    `prefix` begins the names of its parameters in the class `causal`.
    """

    name: str
    causal: str
    prefix: str


def find_base_model(config: ModelConfig) -> BaseModel | None:
    """Find the causal class of a config.json that names a base model; None for all others."""
    family = find_family(config)
    found = None if family is None else family.find_class(config)
    if family is None or found is None or found.at or family.causal is None or not family.causal.at:
        return None
    return BaseModel(found.name, family.causal.name, family.causal.at)


def _move_prefix(renamed: str, parameter: str, name: str) -> str:
    """Change the beginning of a name as `renamed` changed to `parameter`."""
    if parameter.endswith(renamed):
        return parameter.removesuffix(renamed) + name
    return name.removeprefix(renamed.removesuffix(parameter))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unloaded:
    """The stored names that transformers knows and leaves out of a class, by the table."""

    family: Family | None
    model_class: ModelClass | None
    shared: Collection[str]
    find_owner: Callable[[str], str | None]
    rename: Callable[[str], str] = str
    is_tied: bool = True

    def has(self, name: str) -> bool:
        if self.family is None or self.model_class is None or name in self.shared:
            return False
        return self.family.leaves_out(self.rename(name), self.model_class)

    def merge_tied(self, parameters: Mapping[str, str]) -> dict[str, str]:
        """Leave out tensors that share the parameter of another one, and name alone ones by their owner."""
        stored = set(parameters.values())
        # Many tensors are parts of one parameter.
        owners = {parameter: self.find_owner(parameter) for parameter in stored}
        merged: dict[str, str] = {}
        for name, parameter in parameters.items():
            owner = owners[parameter] if name not in self.shared else None
            if owner is None or owner not in stored:
                merged[name] = there = owner or parameter
                stored.add(there)
            # The values of weights were compared. transformers keeps both if they differ.
            elif self.is_tied and is_weight(parameter):
                merged[name] = parameter
        return merged


def _load(
    stored: Sequence[str],
    weights: Collection[str],
    layers: int | None,
    find: Callable[[Iterable[str]], Mapping[str, tuple[str, str]]],
    unloaded: _Unloaded,
) -> Naming:
    """Find the parameters of all stored names, as transformers loads them.

    Args:
        find: finds the parameters of stored names, each with the stored name as the family renames it.
    """

    def is_known(name: str) -> bool:
        return is_extra_layer(module_of(name), layers) or bool(find([name])) or unloaded.has(name)

    plain, prefixes = remove_wrappers(stored, weights, cache(is_known))
    # transformers does not load layers for multi-token prediction.
    extra = {name for name in stored if is_extra_layer(module_of(plain[name]), layers)}
    found = find([plain[name] for name in stored if name not in extra])
    parameters = _tell_apart({name: found[plain[name]] for name in stored if plain[name] in found}, plain)
    merged = unloaded.merge_tied(parameters)
    left_out = extra | (parameters.keys() - merged.keys())
    # A tensor is not left out if another tensor has its parameter. It counts as unknown.
    left_out |= {name for name in stored if plain[name] not in found and unloaded.has(plain[name])}
    not_loaded = left_out - merged.keys()
    unknown = tuple(name for name in weights if name not in merged and name not in not_loaded)
    warnings = _warn_of_wrappers(prefixes)
    if unknown:
        warnings.append(_warn_of_unknown([module_of(name) for name in unknown]))
    return Naming(
        names=Names.CHECKPOINT,
        parameters=merged,
        not_loaded=frozenset(not_loaded),
        unknown=unknown,
        is_established=not unknown,
        warnings=tuple(warnings),
    )


def _tell_apart(found: Mapping[str, tuple[str, str]], plain: Mapping[str, str]) -> dict[str, str]:
    """Leave out tensors that would share a parameter, unless the family fuses them into its experts.

    A tensor that has the name of the parameter already keeps it.
    """
    names: dict[str, set[str]] = {}
    for name, (renamed, parameter) in found.items():
        names.setdefault(parameter, set()).add(renamed if _is_fused(parameter) else plain[name])
    return {
        name: parameter
        for name, (renamed, parameter) in found.items()
        if len(names[parameter]) == 1 or parameter == (renamed if _is_fused(parameter) else plain[name])
    }


def _is_fused(parameter: str) -> bool:
    return is_fused_experts(module_of(parameter))


def _warn_of_unknown(modules: Sequence[str]) -> str:
    some = listed(list(dict.fromkeys(modules)), 5)
    return f"these modules have no parameter in the model, so they keep the checkpoint's names: {some}"


def _loads_nothing(naming: Naming, weights: Collection[str]) -> bool:
    return bool(weights) and not any(name in naming.parameters for name in weights)


def _leave_out_unknown(naming: Naming, model_class: str) -> Naming:
    """Leave out the weights that a model of the installed transformers does not have."""
    if not naming.unknown:
        return naming
    some = listed(list(dict.fromkeys(map(module_of, naming.unknown))), 5)
    left_out = f"{model_class} has no parameter for these modules, so they are left out: {some}"
    return replace(
        naming,
        not_loaded=naming.not_loaded | set(naming.unknown),
        unknown=(),
        is_established=True,
        warnings=(*naming.warnings[:-1], left_out),
    )


def _keep_names(stored: Sequence[str], weights: Collection[str], warning: str) -> Naming:
    """Keep the names of the checkpoint, without the prefixes that only wrappers have."""
    rename = families.compile_rules(())
    plain, prefixes = remove_known_wrappers(stored, weights)
    return Naming(
        names=Names.CHECKPOINT,
        parameters={name: rename(plain[name]) for name in stored},
        is_established=False,
        warnings=(warning, *_warn_of_wrappers(prefixes)),
    )


def _warn_of_wrappers(prefixes: Sequence[str]) -> list[str]:
    if not prefixes:
        return []
    what = "the prefix of a wrapper was" if len(prefixes) == 1 else "the prefixes of wrappers were"
    return [f"{what} removed from the names of the checkpoint: {listed(prefixes)}"]


def _warn_of_misfit(naming: Naming, weights: Collection[str], model_class: str, names: Names) -> str:
    if not naming.unknown:
        return f"{model_class} of {names} loads none of the weights, so the names of the checkpoint are used"
    share = f"{len(naming.unknown)} of {counted(len(weights), 'weight', 'weights')}"
    some = listed(naming.unknown)
    return f"{share} are not in {model_class} of {names}, so the names of the checkpoint are used: {some}"


def _warn_of_class(config: ModelConfig, names: Names) -> str:
    classes = listed(config.architectures)[:100]
    return f"the names of {names} are not known for {classes}, so the names of the checkpoint are used"


def _warn_of_code(model_class: str) -> str:
    return (
        "config.json names code of the repo for the model (auto_map), which is not run, so the names of the "
        f"checkpoint are used; --names {Names.INSTALLED} has the names in a trainer that loads {model_class} instead"
    )


def _warn_of_family(family: str | None, names: Names, *, has_config: bool) -> str:
    if not has_config:
        return (
            f"there is no config.json, so the names of {names} are not known and the names of the checkpoint are "
            "used; put the config.json of the model beside the weights"
        )
    if family is None:
        return (
            f"config.json has no model_type, so the names of {names} are not known, and the names of the checkpoint "
            "are used"
        )
    return (
        f"the names of {names} are not known for the family {family[:100]!r}, so the names of the checkpoint are "
        f"used; --names {Names.INSTALLED} gets them from the installed transformers"
    )


def _hash_names(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(names))).encode("utf-8", "surrogatepass")).hexdigest()


def _rename_matrices(matrices: Sequence[Matrix], skipped: Sequence[Skipped], naming: Naming) -> NamedMatrices:
    """Give each matrix its parameter, unless a part of that parameter has no score."""
    if naming.names == Names.CHECKPOINT and naming.is_established:
        return NamedMatrices(matrices=tuple(matrices), naming=naming, warnings=naming.warnings)
    parameters = naming.parameters
    incomplete = {parameters.get(_stored_name_of(s)) for s in skipped if s.no_score.is_failure}
    missing = {s.tensor for s in skipped if s.no_score is NoScore.MISSING_EXPERTS}
    if missing:
        incomplete |= {parameters.get(w.parameter) for w in matrices if fused_name_of(w.module) in missing}
    kept: list[Matrix] = []
    not_loaded: list[Matrix] = []
    partial: list[str] = []
    # The experts of a layer become one parameter.
    find_group = cache(naming.find_group)
    for w in matrices:
        parameter = parameters.get(w.parameter)
        if w.tied_to is not None:
            # A class can have another head, and a list has a tied parameter once.
            if parameter == w.parameter or naming.names == GIVEN:
                kept.append(w)
            elif parameter is not None and is_head(module_of(parameter)):
                kept.append(replace(w, group=group_of(module_of(parameter)), parameter=parameter))
        elif w.parameter in naming.not_loaded:
            not_loaded.append(w)
        elif parameter is None or parameter == w.parameter:
            kept.append(w)
        elif parameter in incomplete:
            kept.append(w)
            partial.append(w.result_name)
        else:
            # The group of another tower or of an extra layer keeps its prefix.
            prefix = w.group.removesuffix(group_of(w.result_name))
            kept.append(replace(w, group=prefix + find_group(parameter), parameter=parameter))
    return NamedMatrices(
        matrices=tuple(kept),
        naming=naming,
        not_loaded=tuple(not_loaded),
        warnings=(*naming.warnings, *([_warn_of_partial(partial)] if partial else [])),
    )


def _warn_of_partial(modules: Sequence[str]) -> str:
    some = listed(list(dict.fromkeys(modules)), 5)
    return f"other parts of these modules have no score, so they keep the checkpoint's names: {some}"


def _stored_name_of(s: Skipped) -> str:
    """Return the stored name of a skipped parameter, or of the first missing expert."""
    owner, _, projection = s.tensor.rpartition(".")
    return f"{owner}.0.{projection}.weight" if s.no_score is NoScore.MISSING_EXPERTS else parameter_of(s.tensor)


def _match_names(names: Sequence[str], stored: Sequence[str], weights: Sequence[str], family: str | None) -> Naming:
    """Find each stored name among the names in a trainer.

    A trainer's model can be wrapped, and can be a part of the checkpoint's model or contain it. So one prefix of all
    names can be removed, and another one added. With each renaming of the family, the change that finds the most
    names is tried, and the best combination wins. All names get the same one, because two tensors must not become one
    parameter unless the family fuses them.

    Raises:
        UsageError: no_such_name, nothing is found.
    """
    given = {without_components(name): name for name in reversed(names)}
    unwrapped = {name: without_components(name) for name in stored}
    best: dict[str, str] = {}
    plain: dict[str, str] = {}
    for rules in dict.fromkeys(((), *(t[family] for t in (families.V5, families.V4) if family and family in t))):
        rename = families.compile_rules(rules)
        renamed = {name: rename(there) for name, there in unwrapped.items()}
        change = find_change(list(dict.fromkeys(renamed.values())), given)
        changed = change.apply_to_all(dict.fromkeys(renamed.values()))
        found = {name: given[there] for name in stored if (there := changed.get(renamed[name], "")) in given}
        if len(found) > len(best):
            best, plain = found, {parameter: renamed[name] for name, parameter in found.items()}
    if not best:
        raise UsageError(
            "no name in the list belongs to a weight of the checkpoint",
            reason="no_such_name",
            hint="print the names with: for name, _ in model.named_parameters(): print(name)",
        )
    unknown = tuple(name for name in weights if name not in best)
    warnings = (_warn_of_unknown([module_of(name) for name in unknown]),) if unknown else ()
    return Naming(names=GIVEN, parameters=best, unknown=unknown, plain=plain, warnings=warnings)


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of parameters from a file: one per line, or a JSON list.

    The part of a line after a space is ignored.

    Raises:
        FileError: not_a_file, file_too_large, unreadable.
        UsageError: no_such_file, no_names.
    """
    try:
        text = read_file(path, FileKind.NAMES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}", reason="no_such_file") from error
    except ValueError as error:
        raise UsageError(f"{path} is not text", reason="no_names") from error
    try:
        data = parse_json(text)
    except JsonTooLarge as error:
        raise above_limit(path, error) from error
    except ValueError:
        data = []
        for line in io.StringIO(text):
            data += line.split(maxsplit=1)[:1]
            if len(data) > MAX_JSON_VALUES:
                raise above_limit(path, JsonTooLarge(f"it has more than {MAX_JSON_VALUES:,} names")) from None
    if not isinstance(data, list) or not data or not all(isinstance(name, str) for name in data):
        raise UsageError(
            f"{path} does not hold a list of names", reason="no_names", hint="write one name a line, or a JSON list"
        )
    if (length := max(map(len, data))) > MAX_NAME_LENGTH:
        raise above_limit(path, JsonTooLarge(f"it has a name of {length:,} characters"))
    return tuple(data)
