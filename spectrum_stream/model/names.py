"""Names: from a tensor's name to the module, the group and the files that Spectrum knows it by.

Pure functions of strings. Every name here may come from a stranger's checkpoint.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..errors import UsageError
from .config import ModelConfig

WEIGHT_SUFFIX = ".weight"

# The filename built from a slug (with its longest suffix) has to fit the usual limit of 255 bytes.
MAX_SLUG_LENGTH = 200

_EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_TOPS = ("", "model", "transformer", "language_model", "language_model.model")
_HEAD_NAMES = ("lm_head", "embed_out", "output")
_EXPERT = re.compile(r"(^|\.)((?:local_)?experts)\.[0-9]+\.")
# Of the language model; what else is called so can have more.
_LAYER = re.compile(
    r"(?:model\.|language_model\.|model\.language_model\.|language_model\.model\.)?layers\.([0-9]{1,9})\."
)
_TOWERS = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech")}
_NORM = re.compile(r".*norm.*|ln(_\w+|\d+)?", re.IGNORECASE)
_EMBEDDING = re.compile(r"wte|wpe|shared|embed_(?!out$)\w+|\w*embed(ding)?s?", re.IGNORECASE)


def is_weight(tensor: str) -> bool:
    """Whether a name is a module's weight; Spectrum scores no biases, buffers and bare parameters."""
    return tensor.endswith(WEIGHT_SUFFIX) and tensor != WEIGHT_SUFFIX


def module_of(tensor: str) -> str:
    """The module that owns a weight: its name without `.weight`; any other name as it is."""
    return tensor.removesuffix(WEIGHT_SUFFIX) if is_weight(tensor) else tensor


def groups_of(module: str) -> set[str]:
    """The groups that a module can be ranked in: its own, pooled with other experts, apart from another tower."""
    own = {group_of(module), group_of(fused_name_of(module) or module)}
    return own | {f"{apart}.{group}" for apart in (tower_of(module), "mtp") if apart for group in own}


def group_of(module: str) -> str:
    """The group ("type") in which a module is ranked: its path after the first numeric component.

    `model.layers.3.mlp.down_proj` is ranked as `mlp.down_proj`; a name without a number, `lm_head`, is a
    group of its own; the members of a bare sequence, `projector.0` and `projector.2`, share the group "".
    """
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[i + 1 :])
    return module


def is_fused_experts(module: str) -> bool:
    """Whether a tensor of three dimensions by this name holds one matrix for each expert.

    `mlp.experts.gate_up_proj` (transformers 5, Llama-4, gpt-oss, Qwen3-VL-MoE), the `input_linear` and
    `output_linear` of Granite and JetMoE, and `moe.gate_proj` (Step3).
    """
    parts = module.split(".")
    if "conv" in parts[-1]:
        return False
    owner = next((i for i, part in enumerate(parts[:-1]) if part in ("experts", "local_experts")), None)
    # With a number behind it, it is one expert's own.
    bank = owner is not None and not parts[owner + 1].isdecimal()
    step3 = parts[-2:-1] == ["moe"] and parts[-1] in ("gate_proj", "up_proj", "down_proj")
    return bank or step3 or parts[-1] in ("input_linear", "output_linear")


def is_stacked_experts(module: str) -> bool:
    """Whether a tensor of two dimensions by this name holds all experts, one above the other: DBRX."""
    return module.endswith((".experts.mlp.w1", ".experts.mlp.v1", ".experts.mlp.w2"))


def is_single_expert(module: str) -> bool:
    """Whether a module is one expert's own: `mlp.experts.7.up_proj`."""
    return _EXPERT.search(module) is not None


def fused_name_of(module: str) -> str | None:
    """What the experts of a layer are called together: `mlp.experts.up_proj` for `mlp.experts.7.up_proj`."""
    return _EXPERT.sub(r"\1\2.", module, count=1) if is_single_expert(module) else None


def without_expert(group: str) -> str:
    """The group of the experts of all numbers: `mlp.experts.up_proj` for `mlp.experts.7.up_proj`."""
    return _EXPERT.sub(r"\1\2.", group, count=1)


def expert_of(module: str) -> str:
    """The number of an expert, as written: `7` for `mlp.experts.7.up_proj`; "" for what is none."""
    found = _EXPERT.search(module)
    return found[0].strip(".").rpartition(".")[2] if found else ""


def pool_of(module: str, group: str) -> str | None:
    """What an expert is ranked together with, if its group is one of all experts: the experts of its layer."""
    bank = fused_name_of(module)
    return bank if bank is not None and f".{group}".endswith(f".{group_of(bank)}") else None


def tower_of(module: str) -> str:
    """`vision` or `audio` for a layer of such a part of a multimodal model, "" for all else."""
    for part in module.split("."):
        if part.isdecimal():
            break
        for tower, tokens in _TOWERS.items():
            if any(token in part for token in tokens):
                return tower
    return ""


def is_extra_layer(module: str, layers: int | None) -> bool:
    """Whether it is of a layer that predicts tokens further ahead, behind the model's own; many trainers drop those.

    `mtp.layers.0` (Qwen3-Next), `model.mtp_block.0` (ERNIE), `model.mtp_layers.0` (MiMo), and in DeepSeek-V3 and GLM
    the layer behind the last.

    Args:
        layers: how many the model has, by its config.json.
    """
    for part in module.split("."):
        if part.isdecimal():
            break
        if part == "mtp" or part.startswith("mtp_"):
            return True
    found = _LAYER.match(module)
    return found is not None and layers is not None and int(found[1]) >= layers


def is_norm(module: str) -> bool:
    """Whether a module is a norm by its name: `input_layernorm`, `q_norm`, `ln_1`."""
    return _NORM.fullmatch(module.rsplit(".", 1)[-1]) is not None


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding by its name: `model.embed_tokens`, `wte`, `word_embeddings`."""
    return not is_norm(module) and _EMBEDDING.fullmatch(module.rsplit(".", 1)[-1]) is not None


def is_head(module: str) -> bool:
    """Whether a module is a language model's head by its name: `lm_head`, outside of any layer."""
    path, _, name = module.rpartition(".")
    # An `output` is a head at the top, and a projector's somewhere else.
    return name in _HEAD_NAMES and group_of(module) == module and (name != "output" or path in _TOPS)


def group_order(group: str) -> tuple[str, str]:
    """Sort key of a group in Spectrum's files: by its first component, then by the whole name."""
    return group.split(".", 1)[0], group


def model_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts modules in the model's order: numbers by value, so that layer 2 is before 10."""
    # Digits are compared by length and then as text: an int() of a hostile, 5,000-digit layer raises.
    return tuple(
        (0, len(digits := part.lstrip("0")), digits) if part.isdecimal() else (1, 0, part)
        for part in module.split(".")
    )


def slug(model: str) -> str:
    """The part of a result's filename that stands for MODEL, as typed: `org/some_model` → `org-some-model`.

    Spectrum replaces `/` and `_`; whatever else could mean something to a file system is replaced too.
    Many models can share a slug, so a slug never identifies one.
    """
    return re.sub(r"[^A-Za-z0-9.\-]", "-", model)


def find_tied_head(tensors: Iterable[str], config: ModelConfig) -> tuple[str, str] | None:
    """Find the head that a causal language model shares with its embedding, and the embedding's tensor.

    Such a checkpoint holds one tensor for the two. The model, and so Spectrum's result, has both modules.

    Args:
        tensors: the names in the checkpoint.

    Returns:
        (`lm_head`, name of the embedding tensor), or None if the head is stored or the model has none. A causal model
        that stores no head and does not say that it is untied can only be a tied one: configs leave the flag out
        when it has the family's default.
    """
    # A multimodal model has a head as well. A model that translates ties three tensors.
    if not (config.is_causal or config.is_multimodal) or config.ties_embeddings is False:
        return None
    modules = {module_of(t): t for t in tensors if is_weight(t)}
    # The head of a language model that is a part of the whole has a prefix.
    if any(is_head(m) and not tower_of(m) for m in modules):
        return None
    embeddings = sorted((m for m in modules if m.rsplit(".", 1)[-1] in _EMBEDDING_NAMES), key=model_order)
    # A model with the embedding of an encoder, such as BLIP, has another head.
    if len(embeddings) != 1 or not (config.is_causal or embeddings[0].endswith("embed_tokens")):
        return None
    return "lm_head", modules[embeddings[0]]


def pick_groups(groups: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The groups that any pattern names, exactly or as a glob; never by a part of the name.

    Raises:
        UsageError: no_such_group, for a pattern that names none.
    """
    names = sorted(set(groups), key=group_order)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(
                f"no group is called or matches {pattern!r}",
                reason="no_such_group",
                hint=f"the groups are: {', '.join(names[:40])}{' ...' if len(names) > 40 else ''}",
            )
        chosen |= matched
    return chosen
