"""LLaMA-Factory: `finetuning_type: freeze`, which trains the first or the last n layers, or kinds of modules of them.

`freeze_trainable_layers` is n, negative for the first ones. A parameter is trained if `.{layer}.{module}` is a part
of its name for a layer of those and an entry of `freeze_trainable_modules`, the first component after the layer; or
if an entry of `freeze_extra_modules` is, a module outside of the layers. (llamafactory/model/adapter.py,
_setup_freeze_tuning) A choice of single matrices is nothing that this can say; few selections pass.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .targets import needs_names, targets_of

SUFFIX = "yaml"
ADVICE = "the keys are a part of a config of LLaMA-Factory"

_LAYER = re.compile(r"^(.*?)\.(\d+)\.([^.]+)")


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The part of the config.

    Raises:
        ResultError: needs_names; not_expressible, the choice is not whole modules of the first or last layers;
            no_such_parameter.
    """
    targets = targets_of(selection, parameters)
    if not targets.complete:
        raise needs_names("LLaMA-Factory's format")
    wanted = set(targets.parameters)
    inside = [match for name in sorted(wanted) if (match := _LAYER.match(name))]
    outside = sorted({name.split(".")[-2] for name in wanted if not _LAYER.match(name) and "." in name})
    layers = {int(match[2]) for match in inside}
    kinds = sorted({match[3] for match in inside})
    count = _layer_count(targets.known)
    for n in (len(layers), -len(layers)):
        config = {
            "finetuning_type": "freeze",
            "freeze_trainable_layers": n,
            "freeze_trainable_modules": ",".join(kinds),
            "freeze_extra_modules": ",".join(outside),
        }
        text = yaml.safe_dump({key: value for key, value in config.items() if value != ""}, sort_keys=False)
        if layers and count is not None and matches(text, targets.known) == wanted:
            return text
    raise ResultError(
        "LLaMA-Factory can only train whole modules of the first or last layers, and this is a choice of single ones",
        reason="not_expressible",
        hint="another trainer can: --format axolotl, ms-swift, ...",
    )


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that LLaMA-Factory trains, given a config with this text."""
    config, names = yaml.safe_load(text), list(parameter_names)
    if config.get("finetuning_type", "lora") != "freeze":
        return set(names) if config.get("finetuning_type") == "full" else set()
    count, n = _layer_count(names) or 0, config["freeze_trainable_layers"]
    layers = range(max(0, count - n), count) if n > 0 else range(min(-n, count))
    parts = [f".{layer}.{kind}" for kind in config["freeze_trainable_modules"].split(",") for layer in layers]
    parts += [kind for kind in config.get("freeze_extra_modules", "").split(",") if kind]
    return {name for name in names if any(part in name for part in parts)}


def _layer_count(names: Sequence[str]) -> int | None:
    """The number of layers, which the trainer reads in the config; None where there is more than one stack."""
    found = [match for name in names if (match := _LAYER.match(name))]
    if len({match[1] for match in found}) != 1:
        return None
    return max(int(match[2]) for match in found) + 1
