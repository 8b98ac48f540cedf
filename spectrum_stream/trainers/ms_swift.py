"""ms-swift: `trainable_parameters`, a list of names, or `trainable_parameters_regex`, one regular expression.

In full-parameter training with `freeze_parameters_ratio: 1` ms-swift first freezes everything. It then trains each
parameter with a name that starts with an entry of the list, or in which the expression is found. Configs that people
write can freeze in three more ways: a smaller ratio, `freeze_parameters` and `freeze_parameters_regex`.
(ms-swift 4.6.0, swift/utils/transformers_utils.py, freeze_parameters and activate_parameters)

In a model with towers it also freezes the vision tower and its projector, the aligner, unless `freeze_vit` and
`freeze_aligner` are false. (swift/arguments/tuner_args.py, _init_multimodal_full)

The list is written if it is exact. If other parameters start with the name of a chosen one, the expression is.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .parameters import Parameters
from .patterns import alternatives
from .targets import Targets, exactly, targets_of
from .trainer import Entry, Finding, Reason, Trainer, adapter_findings, find_matches, strings
from .yaml_text import listing, scalar

_LIST = "trainable_parameters"
_REGEX = "trainable_parameters_regex"
_FREEZE_LIST = "freeze_parameters"
_FREEZE_REGEX = "freeze_parameters_regex"
_RATIO = "freeze_parameters_ratio"
_KEYS = frozenset({_LIST, _REGEX, _FREEZE_LIST, _FREEZE_REGEX, _RATIO})
_OPTION = re.compile(r"^\s*(?:swift |--[a-z_]+\b)", re.MULTILINE)

# ms-swift starts itself again with its config as arguments, and an argument on Linux can have 32 pages.
_MAX_NBYTES = 131_072


class _Parts(NamedTuple):
    """The starts of the names of a model's parts."""

    language_model: tuple[str, ...]
    tower: tuple[str, ...]
    aligner: tuple[str, ...]


_LLM = ("model.language_model", "lm_head")
_VISUAL = _Parts(_LLM, ("model.visual",), ("model.visual.merger",))
_DEEPSTACK = _Parts(_LLM, ("model.visual",), ("model.visual.merger", "model.visual.deepstack_merger_list"))
_LLAVA = _Parts(_LLM, ("model.vision_tower",), ("model.multi_modal_projector",))
_MLLAMA = _Parts(_LLM, ("model.vision_model",), ("model.multi_modal_projector",))
# The parts of models of transformers, by model_type. (swift/model/model_arch.py, with transformers 4.52 or later)
PARTS: Mapping[str, _Parts] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe"), _VISUAL),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _DEEPSTACK),
    **dict.fromkeys(
        ("llava", "llava_next", "llava_onevision", "gemma3", "paligemma", "mistral3", "internvl"), _LLAVA
    ),
    "mllama": _MLLAMA,
}


class MsSwift(Trainer):
    """ms-swift, by names or by an expression."""

    name = "ms-swift"
    suffix = "yaml"
    advice = "use it for full-parameter training; `swift sft` has options of the same names"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the config.

        Raises:
            ResultError: too_large, the list is not exact and the expression too long; no_such_parameter,
                nothing_chosen.
        """
        targets = targets_of(selection, parameters)
        if _is_exact(targets):
            return f"{_RATIO}: 1\n{listing(_LIST, targets.parameters)}"
        expression = exactly(targets.parameters)
        if len(expression.encode("utf-8", "surrogatepass")) >= _MAX_NBYTES:
            raise ResultError(
                f"an expression of {len(expression)} characters is too long for the command line of ms-swift",
                reason="too_large",
                hint="choose fewer modules, or another format",
            )
        return f"{_RATIO}: 1\n{_REGEX}: {scalar(expression)}\n"

    def entries(self, text: str) -> list[Entry]:
        config = _load(text)
        if not config.keys() & _KEYS:
            raise KeyError(_LIST)
        parts = alternatives(config[_REGEX]) if config.get(_REGEX) else []
        return [*_starts(config, _LIST), *(Entry(part, re.compile(part), False) for part in parts)]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        return self.trained(text, Parameters(shapes=dict.fromkeys(names), origin=""))

    def trained(self, text: str, parameters: Parameters) -> set[str]:
        config, names = _load(text), parameters.own
        parts, is_full = _parts_of(parameters), _tuner_of(config) == "full"
        frozen = set(names[: _frozen_count(config, parameters)])
        starts = [*_starts(config, _FREEZE_LIST), *_search(config, _FREEZE_REGEX)]
        chosen = [*_starts(config, _LIST), *_search(config, _REGEX)]
        if parts is not None and is_full:
            starts += [_start(name) for name in _frozen_parts(config, parts)]
            chosen += [] if config.get("freeze_aligner", True) else [_start(name) for name in parts.aligner]
        frozen |= find_matches(starts, names)
        return (set(names) - frozen) | find_matches(chosen, names)

    def advise_all(self, text: str) -> str:
        return "choose fewer" if _ratio_of(_load(text)) >= 1 else f"set {_RATIO}: 1"

    def loads_classifier(self, text: str) -> bool:
        config = _load(text)
        return config.get("task_type", "seq_cls" if config.get("num_labels") else None) == "seq_cls"

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        config = _load(text)
        findings = adapter_findings("tuner_type", _tuner_of(config))
        has_towers = parameters.config is not None and parameters.config.is_multimodal
        all_frozen = _ratio_of(config) >= 1 and config.get("freeze_aligner", True)
        if has_towers and _parts_of(parameters) is None and not all_frozen:
            detail = (
                "ms-swift also freezes the towers of this model, and verify does not know their names: "
                f"set {_RATIO}: 1, and list all that is to be trained"
            )
            findings.append(Finding(Reason.TOWER, "freeze_vit, freeze_aligner", detail))
        return findings


def _load(text: str) -> dict[str, Any]:
    """Read a config.

    Raises:
        yaml.YAMLError, RecursionError: it is not YAML.
        ResultError: not_a_selection, it is a script.
    """
    is_script = _OPTION.search(text) is not None
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        if not is_script:
            raise
        config = None
    if is_script and (config is None or isinstance(config, str)):
        raise ResultError(
            "the options of a script are not read",
            reason="not_a_selection",
            hint=f"write them as YAML: `{_LIST}: [NAME, ...]` for `--{_LIST} NAME ...`",
        )
    found: dict[str, Any] = config
    return found


def _is_exact(targets: Targets) -> bool:
    """Whether only chosen parameters start with the names of chosen parameters."""
    # A parameter `experts.down_proj` can have a neighbor `experts.down_proj_bias`, which no result lists.
    if not targets.complete and any(target.is_bare for target in targets.chosen):
        return False
    names = set(targets.parameters)
    return all(other in names for name in names for other in targets.starting_with(name))


def _start(text: str) -> Entry:
    return Entry(text, re.compile(re.escape(text)))


def _starts(config: Mapping[str, Any], key: str) -> list[Entry]:
    return [_start(start) for start in strings(config.get(key) or [])]


def _search(config: Mapping[str, Any], key: str) -> list[Entry]:
    """Return an expression as one entry; a flag or a group of one alternative can affect another one."""
    return [Entry(config[key], re.compile(config[key]), False)] if config.get(key) else []


def _tuner_of(config: Mapping[str, Any]) -> Any:
    return config.get("tuner_type", config.get("train_type", "full"))


def _ratio_of(config: Mapping[str, Any]) -> float:
    ratio = config.get(_RATIO, 0)
    return ratio if isinstance(ratio, (int, float)) else 0


def _frozen_count(config: Mapping[str, Any], parameters: Parameters) -> int:
    """Return how many of the first parameters the ratio freezes: those that end within this share of the weights.

    Raises:
        ResultError: needs_sizes, the order and the sizes of the parameters are not known.
    """
    ratio = _ratio_of(config)
    if not 0 < ratio < 1:
        return len(parameters.own) if ratio >= 1 else 0
    shapes = [parameters.shapes[name] for name in parameters.own]
    if not parameters.is_ordered or any(shape is None for shape in shapes):
        raise ResultError(
            f"{_RATIO}: {ratio} freezes the first parameters of the model, and only transformers knows their order",
            reason="needs_sizes",
            hint=f"add --names transformers, or set {_RATIO}: 1",
        )
    sizes = [math.prod(shape or ()) for shape in shapes]
    return bisect_right(list(accumulate(sizes)), int(sum(sizes) * ratio))


def _parts_of(parameters: Parameters) -> _Parts | None:
    config = parameters.config
    return PARTS.get(config.model_type or "") if config is not None and config.is_multimodal else None


def _frozen_parts(config: Mapping[str, Any], parts: _Parts) -> Iterator[str]:
    """Yield the starts of the names that ms-swift freezes by its settings for towers."""
    settings: Sequence[tuple[str, bool, tuple[str, ...]]] = (
        ("freeze_llm", False, parts.language_model),
        ("freeze_vit", True, parts.tower),
        ("freeze_aligner", True, parts.aligner),
    )
    for key, default, starts in settings:
        if config.get(key, default):
            yield from starts
