"""LLaMA-Factory: `finetuning_type: freeze`, which trains kinds of modules in the first or the last n layers.

`freeze_trainable_layers` is n, negative for the first layers. LLaMA-Factory trains a parameter if its name contains
`.{layer}.{module}` for one of those layers and an entry of `freeze_trainable_modules`, the first component after the
layer, or `all`; or if its name contains an entry of `freeze_extra_modules`, a module outside of the layers. Without
these keys it trains all modules of the last two layers. With `use_llama_pro` it trains every stride-th layer. In a
model with towers it freezes the vision tower and the projector, unless `freeze_vision_tower` and
`freeze_multi_modal_projector` are false.
(llamafactory 0.9.5, model/adapter.py, _setup_freeze_tuning; model/model_utils/visual.py, get_forbidden_modules)

This can express few selections, and no single matrices.
"""

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ResultError
from ..selection.select import Selection
from .parameters import Parameters
from .patterns import How, check_count
from .reading import read_yaml
from .targets import needs_names, targets_of
from .trainer import Entry, Finding, Reason, Trainer, adapter_findings, find_matches, strings
from .yaml_text import scalar

_LAYER = re.compile(r"^(.*?)\.([0-9]{1,9})\.([^.]+)")
# Each number of a name. Two numbers can share the dot between them.
_NUMBER = re.compile(r"\.(?=(0|[1-9][0-9]{0,8})\.)")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer")


class _Parts(NamedTuple):
    """Parts of the names of parameters by the part of the model."""

    projector: tuple[str, ...] = ("multi_modal_projector",)
    tower: tuple[str, ...] = ("vision_tower",)
    language_model: tuple[str, ...] = ("language_model", "lm_head")


_QWEN = _Parts(("visual.merger",), ("visual.patch_embed", "visual.blocks"))
_QWEN3 = ("visual.pos_embed", "visual.patch_embed", "visual.blocks")
_QWEN3_VL = _Parts(("visual.merger",), (*_QWEN3, "visual.deepstack_merger_list"))
_QWEN3_5 = _Parts(("model.visual.merger",), _QWEN3)
# By model_type. (llamafactory 0.9.5, model/model_utils/visual.py, _register_composite_model)
PARTS: Mapping[str, _Parts] = {
    **dict.fromkeys(
        ("gemma3", "internvl", "interns1", "kimi_vl", "llava", "llava_next", "llava_next_video"), _Parts()
    ),
    **dict.fromkeys(("paligemma", "video_llava"), _Parts()),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr", "qwen2_vl", "qwen2_5_vl"), _QWEN),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _QWEN3_VL),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _QWEN3_5),
    **dict.fromkeys(("llama4", "mllama"), _Parts(tower=("vision_model",))),
    "gemma3n": _Parts(tower=("vision_tower", "audio_tower")),
    "gemma4": _Parts(("model.embed_vision", "model.embed_audio"), ("vision_tower", "audio_tower")),
    "mistral3": _Parts(("model.multi_modal_projector",)),
    "qwen2_audio": _Parts(tower=("audio_tower",)),
}


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
                "freeze_trainable_modules": ",".join(kinds),
                "freeze_extra_modules": ",".join(outside),
            }
            settings = "".join(f"{key}: {scalar(value)}\n" for key, value in config.items() if value)
            text = f"finetuning_type: freeze\nfreeze_trainable_layers: {n}\n{settings}"
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
            *(Entry(kind, rf"\.[0-9]+\.{re.escape(kind)}", How.SEARCH) for kind in kinds),
            *(Entry(kind, re.escape(kind), How.SEARCH) for kind in _extra_modules(config)),
        ]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        return self.trained(text, Parameters(shapes=dict.fromkeys(names), origin=""))

    def trained(self, text: str, parameters: Parameters) -> set[str]:
        config, names = _load(text), parameters.own
        parts = _parts_of(parameters)
        forbidden: list[str] = []
        if parts is not None:
            forbidden += parts.tower if config.get("freeze_vision_tower", True) else ()
            forbidden += parts.projector if config.get("freeze_multi_modal_projector", True) else ()
            forbidden += parts.language_model if config.get("freeze_language_model", False) else ()
        kind = config.get("finetuning_type", "lora")
        if kind not in ("freeze", "full"):
            return set()
        found = set(names)
        if kind == "freeze":
            layers = _layers(config, _count_layers(parameters) or 0)
            kinds = ["" if name == "all" else name for name in _names_in(config, "freeze_trainable_modules", "all")]
            extra = _extra_modules(config)
            if parts is not None and not config.get("freeze_multi_modal_projector", True):
                extra += parts.projector
            found = _in_layers(names, layers, kinds)
            found |= find_matches((Entry(one, re.escape(one), How.SEARCH) for one in extra), parameters.names)
        return {name for name in found if not any(part in name for part in forbidden)}

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        config = _load(text)
        findings = adapter_findings("finetuning_type", config.get("finetuning_type", "lora"))
        count, n = _count_layers(parameters), config.get("freeze_trainable_layers", 2)
        if config.get("use_llama_pro") and count and type(n) is int and n > 0 and count % n:
            detail = f"LLaMA-Factory rejects it, because {count} layers are not a multiple of {n}: correct the number"
            findings.append(Finding(Reason.REJECTED, f"freeze_trainable_layers: {n}", detail))
        has_towers = parameters.config is not None and parameters.config.is_multimodal
        if has_towers and _parts_of(parameters) is None and config.get("finetuning_type") in ("freeze", "full"):
            detail = "LLaMA-Factory may freeze the towers of this model, and verify does not know them"
            findings.append(Finding(Reason.TOWER, "freeze_vision_tower", detail))
        return findings


def _load(text: str) -> dict[str, Any]:
    """Read a config.

    Raises:
        KeyError: it does not have a key about freezing. All of these keys have a default.
    """
    config: dict[str, Any] = read_yaml(text)
    if not config.keys() & {"finetuning_type", "freeze_trainable_layers", "freeze_trainable_modules"}:
        raise KeyError("finetuning_type")
    return config


def _extra_modules(config: Mapping[str, Any]) -> list[str]:
    return _names_in(config, "freeze_extra_modules", "")


def _names_in(config: Mapping[str, Any], key: str, default: str) -> list[str]:
    """Return the names in a text with commas, or in a list."""
    value = config.get(key) or default
    if isinstance(value, str):
        check_count(value.count(","))
    names = value.split(",") if isinstance(value, str) else strings(value)
    return [name.strip() for name in names if name.strip()]


def _parts_of(parameters: Parameters) -> _Parts | None:
    return None if parameters.config is None else PARTS.get(parameters.config.model_type or "")


def _in_layers(names: Iterable[str], layers: range, kinds: Iterable[str]) -> set[str]:
    """Return the names that contain `.{layer}.{kind}` for a layer and a kind."""
    starts = frozenset(kinds)
    lengths = sorted({len(kind) for kind in starts})
    return {
        name
        for name in names
        for number in _NUMBER.finditer(name)
        if int(number[1]) in layers
        for rest in [number.end(1) + 1]
        if any(name[rest : rest + length] in starts for length in lengths if rest + length <= len(name))
    }


def _layers(config: Mapping[str, Any], count: int) -> range:
    """Return the numbers of the layers that are trained, of `count`."""
    n = config.get("freeze_trainable_layers", 2)
    if type(n) is not int or (n == 0 and config.get("use_llama_pro")):
        raise ResultError(
            f"freeze_trainable_layers: {reprlib.repr(n)} is not a number of layers", reason="not_a_selection"
        )
    if config.get("use_llama_pro"):
        stride = max(count // n, 1)
        return range(stride - 1, count + stride - 1, stride)
    return range(max(0, count - n), count) if n > 0 else range(min(-n, count))


def _count_layers(parameters: Parameters) -> int | None:
    """Return the number of layers of the language model, by config.json or by the names."""
    config = parameters.config
    parts: tuple[Mapping[str, Any], ...] = () if config is None else (config.text, config.data)
    said = (part.get(key) for part in parts for key in _LAYER_COUNTS)
    return next((n for n in said if type(n) is int and n > 0), None) or _layer_count(parameters.own)


def _layer_count(names: Sequence[str]) -> int | None:
    """Return the number of layers, which LLaMA-Factory reads from the config.

    Return None for several stacks of layers.
    """
    found = [match for name in names if (match := _LAYER.match(name))]
    if len({match[1] for match in found}) != 1:
        return None
    return max(int(match[2]) for match in found) + 1
