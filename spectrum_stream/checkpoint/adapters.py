"""Adapters: small tensors that change a model. They are recognized by their names, as data.

An adapter alone is not a model, so it is rejected. Adapter tensors beside the weights that they change are left out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..text import printable


class _Kind(NamedTuple):
    """A kind of adapter, and a pattern for the last three parts of its tensors' names.

    A name that begins with a digit is matched as a whole.
    """

    name: str
    pattern: re.Pattern[str]


def _kind(name: str, pattern: str) -> _Kind:
    return _Kind(name, re.compile(rf"(?:^|[._])(?:{pattern})", re.IGNORECASE))


# Unambiguous names, from PEFT, LyCORIS, kohya's sd-scripts, diffusers, x-flux and MLX: X.lora_A.weight,
# lora_unet_X.lora_down.weight, X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.up.weight,
# X.processor.qkv_lora1.down.weight and X.lora_a. The tensors X_lora.lora.0.weight of RWKV-7 are a part of the model.
_CERTAIN = (
    _kind("LoHa", r"hada_[wt]\d"),
    _kind("LoKr", r"lokr_[wt]\d"),
    _kind("DoRA", r"(dora_scale|lora_magnitude_vector)(?![a-z0-9])"),
    _kind("LoRA", r"lora\d*[._](a|b|e|up|down|mid|embedding_[ab]|ranknum|linear_layer)(?![a-z0-9])"),
    _kind("IA3", r"ia3_l(?![a-z0-9])"),
)
# A full model can have a few tensors of such names, so these count only if they are the majority. The long list has
# the prefixes of PEFT_TYPE_TO_PREFIX_MAPPING of PEFT, and of its earlier versions.
_AS_MAJORITY = (
    _kind("prompt tuning", r"(prompt_embeddings|prompt_tuning|p_tuning|multitask_prompt_tuning)(?![a-z0-9])"),
    _kind("prefix tuning", r"(prefix_tuning_|adaption_(prompt|gate)|cpt_|cartridge_)"),
    _kind("bottleneck", r"adapter_(down|up)(?![a-z0-9])"),
    _kind("textual inversion", r"(emb_params|learned_embeds)$"),
    _kind("LyCORIS", r"(diff|diff_b|w_norm|b_norm|on_input)$"),
    _kind("LoRA", r"alpha$"),
    # Megatron-Bridge, X.linear_qkv.adapter.linear_in.weight, and NeMo
    _kind("LoRA", r"adapter\.linear_(in|out)\.(weight|bias)$"),
    # stable-diffusion-webui: a key begins with a dimension of the text encoder or of the denoiser.
    _kind("hypernetwork", r"^\d{3,4}\.[01]\.linear[12]?\..*"),
    _kind("LyCORIS", r"^(lora_(unet|te\d?|transformer|prior)|lycoris)_.*"),
    _kind(
        "PEFT",
        r"(adamss|beft|boft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lily|ln_tuning|lokr|lora|"
        r"miss|oft|osf|peanut|poly|psoft|pvera_lambda|randlora|road|shadow|shira|supertuning|tinylora|"
        r"trainable_tokens|unilora|vblora|vera_lambda|waveft|xlora)_",
    ),
)
# Empty tensors that a program adds to mark the kind of the file. The names of the other tensors do not show it.
_MARKERS = {"lora_controlnet": "control-LoRA"}
_ORIGINAL = re.compile(r"\.parametrizations\.[^.]+\.original\d?$")
_TAIL_LENGTH = 200
_BASE = ("base_model_name_or_path", "model")
_BASE_IN_METADATA = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "base_model")
_PEFT_TYPES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}


class Adapter(NamedTuple):
    """The adapter tensors of a checkpoint.

    Attributes:
        kind: "LoRA".
        names: of the tensors of the adapter.
        is_alone: whether the weights that it changes are missing, so this is not a model.
    """

    kind: str
    names: frozenset[str]
    is_alone: bool


def find_adapter(names: Sequence[str], shard: str, config: Mapping[str, Any] | None) -> Adapter | None:
    """Find the adapter among the tensors of a checkpoint.

    It is alone if it has most of the tensors, or if PEFT saved all others with it, and no weight that it changes is
    stored.

    Args:
        names: of all tensors.
        shard: the name of the first shard.
        config: adapter_config.json; None without one.

    Returns:
        None without an adapter.
    """
    if config is not None and re.match(r"adapter_model\b", shard):
        # Only PEFT and its peers write a file of this name.
        kind = config.get("peft_type")
        kind_name = _PEFT_TYPES.get(kind, printable(kind)[:40]) if isinstance(kind, str) else "PEFT"
        return Adapter(kind_name, frozenset(names), is_alone=True)
    if (marker := next((name for name in names if name in _MARKERS), None)) is not None:
        return Adapter(_MARKERS[marker], frozenset(names), is_alone=True)
    # The LoRA of a torch parametrization beside the originals is a part of the model, as in jina-embeddings-v3.
    is_parametrized = any(_ORIGINAL.search(name) for name in names)
    # Names of many experts end alike, so most are looked up.
    seen: dict[str, tuple[str, bool, int] | None] = {}
    certain: dict[str, tuple[str, str]] = {}
    likely: dict[str, tuple[str, str]] = {}
    for name in names:
        if is_parametrized and ".parametrizations." in name:
            continue
        end = name if name[:1].isdigit() else ".".join(name.rsplit(".", 3)[-3:])
        tail = end[-_TAIL_LENGTH:]
        if tail not in seen:
            seen[tail] = _find_kind(tail)
        if (found := seen[tail]) is not None:
            kind_name, is_certain, start = found
            module = name[: len(name) - len(tail) + start].rstrip(".")
            (certain if is_certain else likely)[name] = (kind_name, module)
    majority = 2 * (len(certain) + len(likely)) > len(names)
    found_here = certain | likely if majority else certain
    # A tensor called alpha or diff is a part of an adapter only among others of its kind.
    if not any(_is_telling(name, kind) for name, (kind, _) in found_here.items()):
        return None
    stored = set(names) - found_here.keys()
    has_base = any(
        f"{module}{weight}" in stored
        for _, module in certain.values()
        for weight in (".base_layer.weight", ".weight")
    )
    is_alone = not has_base and (majority or all(name.startswith("base_model.") for name in names))
    if not is_alone:
        found_here = certain
    if not found_here:
        return None
    kinds = [kind for kind, _ in found_here.values()]
    rare = next((kind for kind in ("LoHa", "LoKr", "DoRA") if kind in kinds), None)
    return Adapter(rare or max(sorted(set(kinds)), key=kinds.count), frozenset(found_here), is_alone)


def base_of(config: Mapping[str, Any] | None, metadata: Iterable[Mapping[str, str]]) -> str | None:
    """Return the name of an adapter's base model, from adapter_config.json or the metadata of a shard.

    The metadata has a title, or the name of a file on another machine, so only the config can tell what to scan.
    """
    said: list[object] = [] if config is None else [config.get(key) for key in _BASE]
    said += [data.get(key) for data in metadata for key in _BASE_IN_METADATA]
    name = next((text for text in said if isinstance(text, str) and text.strip()), None)
    return None if name is None else printable(name)[:200]


def _find_kind(tail: str) -> tuple[str, bool, int] | None:
    """Return the kind of a tensor by the end of its name, whether that is certain, and where its name starts."""
    for kinds, is_certain in ((_CERTAIN, True), (_AS_MAJORITY, False)):
        for kind in kinds:
            if (match := kind.pattern.search(tail)) is not None:
                return kind.name, is_certain, match.start()
    return None


def _is_telling(name: str, kind: str) -> bool:
    if kind in ("LoRA", "LyCORIS") and name.endswith(
        (".alpha", ".diff", ".diff_b", ".w_norm", ".b_norm", ".on_input")
    ):
        return name.startswith(("lora_", "lycoris_"))
    return True
