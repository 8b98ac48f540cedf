"""PEFT: the options of a `LoraConfig` that adapts the chosen modules.

A string as `target_modules` is a regular expression that must match the whole name of a module. An entry of
`target_parameters` is the whole name of a parameter, or its end after a dot. It is for fused experts, which are not
modules. The key of `rank_pattern` that first matches a name as `(.*\\.)?(key)$` gives its rank.
(peft 0.21.2, tuners/tuners_utils.py, check_target_module_exists and _inject_parameters; utils/other.py,
get_pattern_key)

For mixtures of experts PEFT reduces a string to the last parts of the names that it matches, and drops the layers.
It also treats `gate`, `up_proj` and others as the experts of transformers 4, wherever they are. So such models get a
list of whole names. The export fails for names that PEFT would treat as experts, and for routers, which PEFT cannot
adapt. (utils/transformers_weight_conversion.py, _convert_peft_config_moe)

An adapter does not train the weight itself. So the head and the embedding, which Spectrum always trains, are adapted
only if they were chosen. The better half of the chosen modules of a group has twice the rank of the rest. This is a
rule of this tool, not a published one. Delete `rank_pattern` to have one rank. Fused experts have the lower rank,
because PEFT 0.21 ignores their keys.
"""

import json
import re
import shlex
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

from ..errors import ResultError
from ..model.names import group_of, is_embedding, is_fused_experts, is_head, is_norm
from ..selection.select import Selection
from .parameters import Parameters
from .patterns import How, Names, alternatives, check_count
from .reading import read_json
from .targets import Target, inexact, targets_of
from .trainer import Entry, Finding, Reason, Trainer, strings

RANK = 16
# A keyword of PEFT, not a regular expression.
_ALL_LINEAR = "all-linear"
_TAKEN_FOR_EXPERTS = ("gate", "router", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


class Peft(Trainer):
    """PEFT, by adapters of the chosen modules."""

    name = "peft"
    suffix = "json"
    advice = "make LoraConfig(**json.load(open(FILE))) of it; the other weights of the model stay frozen"
    takes = "JSON"
    trains_adapters = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the options as JSON.

        Raises:
            ResultError: not_adaptable, a norm, a tied head, a router or a module that PEFT would treat as experts;
                inexact, the name of fused experts is the end of another name; nothing_chosen; no_such_parameter.
        """
        targets = targets_of(selection, parameters)
        if not targets.chosen:
            raise ResultError("there is nothing to adapt", reason="nothing_chosen")
        # Sorted from the end, names with the same ending are together.
        backward = sorted(name[::-1] for name in targets.names)
        for target in targets.chosen:
            _check(target, backward)
        fused = [target.parameter for target in targets.chosen if target.is_bare]
        modules = [_module(target) for target in targets.chosen if not target.is_bare]
        is_mixture = _is_mixture((*targets.names, *fused))
        if is_mixture and (taken := [m for m in modules if m.rsplit(".", 1)[-1] in _TAKEN_FOR_EXPERTS]):
            raise ResultError(
                f"PEFT does not adapt routers, and treats modules of these names as experts: {taken[0]}",
                reason="not_adaptable",
                hint=_leave_out(group_of(taken[0])),
            )
        ranks = {
            f"^{re.escape(_module(target))}": 2 * RANK
            for _, group in groupby(targets.chosen, key=lambda target: target.group)
            for target in _better_half(list(group))
            if not target.is_bare
        }
        options: dict[str, object] = {
            "r": RANK,
            "lora_alpha": 2 * RANK,
            # PEFT rejects dropout together with target_parameters.
            "lora_dropout": 0.0,
            "target_modules": modules if is_mixture or not modules else "|".join(map(re.escape, modules)),
            "rank_pattern": ranks,
        }
        return json.dumps(options | ({"target_parameters": fused} if fused else {}), indent=2)

    def entries(self, text: str) -> list[Entry]:
        options = read_json(text)
        modules, fused = options.get("target_modules") or [], strings(options.get("target_parameters") or [])
        if isinstance(modules, str) and modules.lower() == _ALL_LINEAR:
            wholes = []
        elif isinstance(modules, str):
            wholes = [Entry(part, rf"{part}\.weight\Z") for part in alternatives(modules)]
        else:
            wholes = [Entry(end, f"{end}.weight", How.END) for end in strings(modules)]
        return [*wholes, *(Entry(end, end, How.END) for end in fused)]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        """Return the weights that get an adapter."""
        options = read_json(text)
        names = Names.of(names)
        weights = Names(
            (name.removesuffix(".weight") for name in names if name.endswith(".weight")), names.expressions
        )
        excluded = {f"{module}.weight" for module in _adapted(options.get("exclude_modules"), weights)}
        fused = [Entry(end, end, How.END) for end in strings(options.get("target_parameters") or [])]
        if isinstance(modules := options.get("target_modules"), list):
            targeted = names.matched(self.entries(text))
        else:
            targeted = {f"{module}.weight" for module in _adapted(modules, weights)}
        return (targeted - excluded) | names.matched(fused)

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        """Find a string of targets for a mixture of experts."""
        modules = read_json(text).get("target_modules")
        if not isinstance(modules, str) or modules.lower() == _ALL_LINEAR or not _is_mixture(parameters.shapes):
            return []
        detail = "PEFT reduces a string to last parts of names in all layers of a mixture of experts; use a list"
        return [Finding(Reason.TOO_MANY, "target_modules", detail)]


def _check(target: Target, backward: Sequence[str]) -> None:
    """Raise ResultError for a target that PEFT cannot adapt alone.

    Args:
        backward: the names of the model, each from its end to its start, sorted.
    """
    if is_norm(target.module):
        raise ResultError(
            f"LoRA has no adapter for the norm {target.module}", reason="not_adaptable", hint="--no-norms"
        )
    if target.tied:
        raise ResultError(
            f"{target.module} is tied to {target.parameter}, but an adapter would untie them",
            reason="not_adaptable",
            hint="--no-head",
        )
    end = f".{target.parameter}"[::-1]
    others = backward[(first := bisect_left(backward, end)) : first + 1]
    if target.is_bare and others and others[0].startswith(end):
        raise inexact(
            f"{target.parameter} would also adapt {others[0][::-1]}",
            _leave_out(target.group),
        )


def _leave_out(group: str) -> str:
    return f"leave the group out: --groups {shlex.quote(f'{group}=0')}"


def _is_mixture(names: Iterable[str]) -> bool:
    return any(is_fused_experts(name) and not name.endswith(".weight") for name in names)


def _adapted(modules: object, names: Names) -> set[str]:
    """Return the modules that `target_modules` or `exclude_modules` names.

    A string must match the whole name. An entry of a list must be the whole name, or its end after a dot.
    """
    if isinstance(modules, str) and modules.lower() == _ALL_LINEAR:
        # A name is only a guess whether a module is linear. PEFT leaves out the head.
        return {module for module in names if not (is_norm(module) or is_embedding(module) or is_head(module))}
    if isinstance(modules, str):
        check_count(modules.count("|"))
        return names.matched([Entry(modules, modules, How.WHOLE)])
    ends = [name for name in modules if isinstance(name, str)] if isinstance(modules, list) else []
    check_count(len(ends))
    return names.matched([Entry(end, end, How.END) for end in ends])


def _module(target: Target) -> str:
    return target.parameter.removesuffix(".weight")


def _better_half(chosen: list[Target]) -> list[Target]:
    return sorted(chosen, key=lambda target: target.rank_key, reverse=True)[: len(chosen) // 2]
