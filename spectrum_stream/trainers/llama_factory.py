"""LLaMA-Factory: `finetuning_type: freeze`, which trains kinds of modules in the first or the last n layers.

`freeze_trainable_layers` is n, negative for the first layers. LLaMA-Factory trains a parameter if its name contains
`.{layer}.{module}` for one of those layers and an entry of `freeze_trainable_modules`, the first component after the
layer, or `all`; or if its name contains an entry of `freeze_extra_modules`, a module outside of the layers. Without
these keys it trains all modules of the last two layers.
(llamafactory 0.9.5, model/adapter.py, _setup_freeze_tuning)

This can express few selections, and no single matrices.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .parameters import Parameters
from .targets import needs_names, targets_of
from .trainer import Entry, Finding, Trainer, adapter_findings, strings

_LAYER = re.compile(r"^(.*?)\.(\d+)\.([^.]+)")


class LlamaFactory(Trainer):
    """LLaMA-Factory, by layers and kinds of modules."""

    name = "llama-factory"
    suffix = "yaml"
    advice = "copy the keys into your LLaMA-Factory config"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the part of the config.

        Raises:
            ResultError: needs_names; not_expressible, the choice is not whole modules of the first or last layers;
                no_such_parameter, nothing_chosen.
        """
        targets = targets_of(selection, parameters)
        if not targets.complete:
            raise needs_names("LLaMA-Factory's format")
        wanted = set(targets.parameters)
        inside = [match for name in sorted(wanted) if (match := _LAYER.match(name))]
        outside = sorted({name.split(".")[-2] for name in wanted if not _LAYER.match(name) and "." in name})
        layers = {int(match[2]) for match in inside}
        kinds = sorted({match[3] for match in inside})
        count = _layer_count(targets.names)
        for n in (len(layers), -len(layers)):
            config = {
                "finetuning_type": "freeze",
                "freeze_trainable_layers": n,
                "freeze_trainable_modules": ",".join(kinds),
                "freeze_extra_modules": ",".join(outside),
            }
            text = yaml.safe_dump({key: value for key, value in config.items() if value != ""}, sort_keys=False)
            if layers and count is not None and self.matches(text, targets.names) == wanted:
                return text
        raise ResultError(
            "LLaMA-Factory can only train whole modules of the first or last layers, not this choice",
            reason="not_expressible",
            hint="choose a format for single matrices, e.g. --format axolotl or --format ms-swift",
        )

    def entries(self, text: str) -> list[Entry]:
        config = _load(text)
        kinds = [kind for kind in _names_in(config, "freeze_trainable_modules", "all") if kind != "all"]
        return [
            *(Entry(kind, re.compile(rf"\.[0-9]+\.{re.escape(kind)}"), False) for kind in kinds),
            *(Entry(kind, re.compile(re.escape(kind)), False) for kind in _extra_modules(config)),
        ]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        config, names = _load(text), list(names)
        if config.get("finetuning_type", "lora") != "freeze":
            return set(names) if config.get("finetuning_type") == "full" else set()
        count, n = _layer_count(names) or 0, config.get("freeze_trainable_layers", 2)
        layers = range(max(0, count - n), count) if n > 0 else range(min(-n, count))
        kinds = ["" if kind == "all" else kind for kind in _names_in(config, "freeze_trainable_modules", "all")]
        parts = [f".{layer}.{kind}" for kind in kinds for layer in layers]
        parts += _extra_modules(config)
        return {name for name in names if any(part in name for part in parts)}

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        return adapter_findings("finetuning_type", _load(text).get("finetuning_type", "lora"))


def _load(text: str) -> dict[str, Any]:
    """Read a config.

    Raises:
        KeyError: it does not have a key about freezing. All of these keys have a default.
    """
    config: dict[str, Any] = yaml.safe_load(text)
    if not config.keys() & {"finetuning_type", "freeze_trainable_layers", "freeze_trainable_modules"}:
        raise KeyError("finetuning_type")
    return config


def _extra_modules(config: Mapping[str, Any]) -> list[str]:
    return _names_in(config, "freeze_extra_modules", "")


def _names_in(config: Mapping[str, Any], key: str, default: str) -> list[str]:
    """Return the names in a text with commas, or in a list."""
    value = config.get(key) or default
    names = value.split(",") if isinstance(value, str) else strings(value)
    return [name.strip() for name in names if name.strip()]


def _layer_count(names: Sequence[str]) -> int | None:
    """Return the number of layers, which LLaMA-Factory reads from the config.

    Return None for several stacks of layers.
    """
    found = [match for name in names if (match := _LAYER.match(name))]
    if len({match[1] for match in found}) != 1:
        return None
    return max(int(match[2]) for match in found) + 1
