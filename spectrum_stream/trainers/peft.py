"""PEFT: the options of a `LoraConfig` that adapts the chosen modules.

A text as `target_modules` is a regular expression that has to match a module's whole name. A `target_parameters`
entry is a parameter's whole name, or its end after a dot: banks of experts, which have no module of their own. The
key of `rank_pattern` that first matches a name as `(.*\\.)?(key)$` gives its rank. (peft/tuners/tuners_utils.py,
check_target_module_exists and _inject_parameters; peft/utils/other.py, get_pattern_key)

For mixtures of experts PEFT takes a text apart to the last parts of the names that it matches, and forgets the
layers; and it takes `gate`, `up_proj` and others, whatever they are in, for what transformers 4 called the experts.
So they get a list of whole names, and what it would take for experts is refused, as are routers, which are no Linear.
(peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe)

An adapter is no training of the weight itself, so the head and the embedding, which Spectrum always trains, are
adapted only if they were chosen. The better half of what was chosen of a group has twice the rank of the rest. That
is this tool's own choice, and no published rule; delete `rank_pattern` to have one rank. Banks have the lower one,
since PEFT 0.21 says of their keys that it ignores them.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable
from itertools import groupby

from ..errors import ResultError
from ..model.names import group_of, is_embedding, is_fused_experts, is_head, is_norm
from ..selection.select import Selection
from .targets import Target, inexact, targets_of

SUFFIX = "json"
ADVICE = "LoraConfig(**json.load(open(FILE))); the model's other weights stay frozen"

RANK = 16
# PEFT's own word, and no regular expression.
ALL_LINEAR = "all-linear"
_TAKEN_FOR_EXPERTS = ("gate", "router", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The options, as JSON.

    Raises:
        ResultError: not_adaptable, a norm, which LoRA has no adapter for, or a tied head; nothing_chosen; inexact, a
            bank's name that is the end of another's; no_such_parameter.
    """
    targets = targets_of(selection, parameters)
    if not targets.chosen:
        raise ResultError("there is nothing to adapt", reason="nothing_chosen")
    for target in targets.chosen:
        if is_norm(target.module):
            raise ResultError(
                f"LoRA has no adapter for a norm, {target.module}", reason="not_adaptable", hint="--no-norms"
            )
        if target.tied:
            raise ResultError(
                f"{target.module} is tied to {target.parameter}, and an adapter would part them",
                reason="not_adaptable",
                hint="--no-head",
            )
        if target.is_bare and (others := [n for n in targets.known if n.endswith(f".{target.parameter}")]):
            raise inexact(f"{target.parameter} would adapt {others[0]} as well", "leave it out with --modules")
    banks = [target.parameter for target in targets.chosen if target.is_bare]
    modules = [_module(target) for target in targets.chosen if not target.is_bare]
    is_mixture = any(is_fused_experts(name) and not name.endswith(".weight") for name in (*targets.known, *banks))
    if is_mixture and (taken := [m for m in modules if m.rsplit(".", 1)[-1] in _TAKEN_FOR_EXPERTS]):
        raise ResultError(
            f"PEFT adapts no router, and takes modules called so for experts: {taken[0]}",
            reason="not_adaptable",
            hint=f"leave such groups out, by --group '{group_of(taken[0])}=0'",
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
        # With target_parameters PEFT knows no dropout.
        "lora_dropout": 0.0,
        "target_modules": modules if is_mixture or not modules else "|".join(map(re.escape, modules)),
        "rank_pattern": ranks,
    }
    return json.dumps(options | ({"target_parameters": banks} if banks else {}), indent=2)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The weights that get an adapter."""
    options = json.loads(text)
    banks = tuple(options.get("target_parameters") or ())
    wanted, left_out = (_matcher(options.get(key)) for key in ("target_modules", "exclude_modules"))
    return {
        name
        for name in parameter_names
        if ((module := name.removesuffix(".weight")) != name and wanted(module) and not left_out(module))
        or name in banks
        or name.endswith(tuple(f".{bank}" for bank in banks))
    }


def _matcher(modules: object) -> Callable[[str], object]:
    """A text has to match a module's whole name; of a list, one is the whole name or its end after a dot."""
    if isinstance(modules, str) and modules.lower() == ALL_LINEAR:
        # Which ones are linear a name does not say for certain; PEFT leaves out the head.
        return lambda module: not (is_norm(module) or is_embedding(module) or is_head(module))
    if isinstance(modules, str):
        return re.compile(modules).fullmatch
    names = [name for name in modules if isinstance(name, str)] if isinstance(modules, list) else []
    ends = tuple(f".{name}" for name in names)
    return lambda module: f".{module}".endswith(ends)


def _module(target: Target) -> str:
    return target.parameter.removesuffix(".weight")


def _better_half(chosen: list[Target]) -> list[Target]:
    return sorted(chosen, key=lambda target: target.rank_key, reverse=True)[: len(chosen) // 2]
