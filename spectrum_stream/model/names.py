"""Names: from the name of a tensor to its module, its group, and the files that Spectrum writes.

All functions are pure. Every name may come from an untrusted checkpoint.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..errors import UsageError
from ..text import listed
from .config import ModelConfig
from .family_names import can_list_head

WEIGHT_SUFFIX = ".weight"

# A file name with a slug and its longest suffix has to fit the usual limit of 255 bytes.
MAX_SLUG_LENGTH = 200
# The limit for lists of names and for results. A stored name has at most 1000 characters, and a trainer can wrap it.
# Most names have about 50.
MAX_NAME_LENGTH = 2000

_EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_TOPS = ("", "model", "transformer", "language_model", "language_model.model")
_HEAD_NAMES = ("lm_head", "embed_out", "output")
_EXPERT = re.compile(r"(^|\.)((?:local_)?experts)\.[0-9]+\.")
# Only layers of the language model: a tower can have more layers.
_LAYER = re.compile(
    r"(?:model\.|language_model\.|model\.language_model\.|language_model\.model\.|transformer\.)?"
    r"(?:layers|h|blocks)\.([0-9]{1,9})\."
)
_TOWERS = {"vision": ("vision", "visual", "image"), "audio": ("audio", "speech")}
_TOWER = re.compile("|".join(token for tokens in _TOWERS.values() for token in tokens))
_NORM = re.compile(r".*norm.*|ln(_\w+|\d+)?", re.IGNORECASE)
_EMBEDDING = re.compile(r"wte|wpe|shared|embed_(?!out$)\w+|\w*embed(ding)?s?", re.IGNORECASE)


def is_weight(tensor: str) -> bool:
    """Whether a name ends in `.weight`.

    Spectrum scores no biases, buffers or bare parameters.
    """
    return tensor.endswith(WEIGHT_SUFFIX) and tensor != WEIGHT_SUFFIX


def module_of(tensor: str) -> str:
    """Return a name without `.weight`: the module that owns a weight.

    Other names stay as they are.
    """
    # This runs many times for each tensor, so it does not call `is_weight`.
    return tensor[:-7] if tensor.endswith(WEIGHT_SUFFIX) and len(tensor) > 7 else tensor


def groups_of(module: str) -> set[str]:
    """Return the groups that a module can be ranked in.

    These are its own group, the group of all experts, and both with the prefix of a tower or of an extra layer.
    """
    own = {group_of(module), group_of(fused_name_of(module) or module)}
    return own | {f"{apart}.{group}" for apart in (tower_of(module), "mtp") if apart for group in own}


def group_of(module: str) -> str:
    """Return the group ("type") of a module: its path after the first number.

    `model.layers.3.mlp.down_proj` has the group `mlp.down_proj`. A name without a number, `lm_head`, is its own
    group. The members of a bare sequence, `projector.0` and `projector.2`, share the group "".
    """
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[i + 1 :])
    return module


def is_fused_experts(module: str) -> bool:
    """Whether a 3-D tensor with this name holds one matrix for each expert.

    Examples are `mlp.experts.gate_up_proj` (transformers 5, Llama-4, gpt-oss, Qwen3-VL-MoE), the `input_linear` and
    `output_linear` of Granite and JetMoE, `moe.gate_proj` (Step3), and `mlp.switch_mlp.gate_proj` (MLX).
    """
    # Most names have none of these texts. This test is faster than a split.
    if not ("experts" in module or "moe" in module or "switch_mlp" in module or module.endswith("put_linear")):
        return False
    parts = module.split(".")
    if "conv" in parts[-1]:
        return False
    owner = next((i for i, part in enumerate(parts[:-1]) if part in ("experts", "local_experts", "switch_mlp")), None)
    # `experts.7` is one expert.
    is_owned = owner is not None and not parts[owner + 1].isdecimal()
    is_step3 = parts[-2:-1] == ["moe"] and parts[-1] in ("gate_proj", "up_proj", "down_proj")
    return is_owned or is_step3 or parts[-1] in ("input_linear", "output_linear")


def is_stacked_experts(module: str) -> bool:
    """Whether a 2-D tensor stacks all experts, by its name: DBRX."""
    return module.endswith((".experts.mlp.w1", ".experts.mlp.v1", ".experts.mlp.w2"))


def is_single_expert(module: str) -> bool:
    """Whether a module belongs to one expert: `mlp.experts.7.up_proj`."""
    return "experts." in module and _EXPERT.search(module) is not None


def fused_name_of(module: str) -> str | None:
    """Return the fused name of an expert, None for others.

    It is `mlp.experts.up_proj` for `mlp.experts.7.up_proj`.
    """
    found = _EXPERT.search(module) if "experts." in module else None
    return None if found is None else f"{module[: found.start()]}{found[1]}{found[2]}.{module[found.end() :]}"


def without_expert(group: str) -> str:
    """Return the group of all experts for the group of one.

    It is `mlp.experts.up_proj` for `mlp.experts.7.up_proj`.
    """
    return _EXPERT.sub(r"\1\2.", group, count=1)


def expert_of(module: str) -> str:
    """Return the number of an expert as text, "" for others.

    It is `7` for `mlp.experts.7.up_proj`.
    """
    found = _EXPERT.search(module)
    return found[0].strip(".").rpartition(".")[2] if found else ""


def pool_of(module: str, group: str) -> str | None:
    """Return the fused name of an expert if it is ranked with the others.

    Its group is then that of all experts, and the experts of a layer are ranked as one.
    """
    fused_name = fused_name_of(module)
    is_pooled = fused_name is not None and f".{group}".endswith(f".{group_of(fused_name)}")
    return fused_name if is_pooled else None


def tower_of(module: str) -> str:
    """Return `vision` or `audio` for a layer of such a tower, "" for others."""
    if _TOWER.search(module) is None:
        return ""
    for part in module.split("."):
        if part.isdecimal():
            break
        for tower, tokens in _TOWERS.items():
            if any(token in part for token in tokens):
                return tower
    return ""


def is_extra_layer(module: str, layers: int | None) -> bool:
    """Whether a module belongs to a layer for multi-token prediction.

    Many trainers drop these layers: `mtp.layers.0` (Qwen3-Next), `model.mtp_block.0` (ERNIE), `model.mtp_layers.0`
    (MiMo), and the layers after the last in DeepSeek-V3 and GLM.

    Args:
        layers: the number of layers of the language model by config.json, or None.
    """
    for part in module.split(".") if "mtp" in module else ():
        if part.isdecimal():
            break
        if part == "mtp" or part.startswith("mtp_"):
            return True
    found = None if layers is None else _LAYER.match(module)
    return found is not None and layers is not None and int(found[1]) >= layers


def is_norm(module: str) -> bool:
    """Whether a module is a norm by its name: `input_layernorm`, `q_norm`, `ln_1`."""
    return _NORM.fullmatch(module.rsplit(".", 1)[-1]) is not None


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding by its name: `model.embed_tokens`, `wte`."""
    return not is_norm(module) and _EMBEDDING.fullmatch(module.rsplit(".", 1)[-1]) is not None


def is_head(module: str) -> bool:
    """Whether a module is the head of a language model by its name: `lm_head`."""
    path, _, name = module.rpartition(".")
    # An `output` at the top is a head. Elsewhere it belongs to a projector.
    return name in _HEAD_NAMES and group_of(module) == module and (name != "output" or path in _TOPS)


def is_encoder(modules: Iterable[str]) -> bool:
    """Whether a model has embeddings in a module `embeddings` and no head, as BERT has.

    Such a model has neither `lm_head` nor `model.embed_tokens`, not even under a second name.
    """
    found = False
    for module in modules:
        if is_head(module):
            return False
        # One of several shards can have the embeddings of a tower without those of the language model.
        if is_embedding(module) and not tower_of(module):
            found = True
            if module.split(".")[-2:-1] != ["embeddings"]:
                return False
    return found


def group_order(group: str) -> tuple[str, str]:
    """Return the sort key of a group: the first component, then the whole name."""
    return group.split(".", 1)[0], group


def model_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Return the sort key of a module: layer 2 comes before layer 10."""
    # Digits are compared by length and then as text, because int() of a hostile number of 5,000 digits raises.
    return tuple(
        [
            (0, len(digits := part.lstrip("0")), digits) if part.isdecimal() else (1, 0, part)
            for part in module.split(".")
        ]
    )


def slug(model: str) -> str:
    """Return the part of a file name that stands for MODEL.

    It is `org-some-model` for `org/some_model`. Spectrum replaces `/` and `_`. This also replaces all other
    characters that a file system may interpret. Several models can have the same slug, so it does not identify one.
    """
    return re.sub(r"[^A-Za-z0-9.\-]", "-", model)


def find_tied_head(tensors: Iterable[str], config: ModelConfig) -> tuple[str, str] | None:
    """Find the head that a language model shares with its embedding.

    Such a checkpoint holds one tensor for both. The model, and thus Spectrum's result, has both modules.

    Args:
        tensors: the names in the checkpoint.

    Returns:
        (`lm_head`, name of the embedding tensor), or None if the head is stored or the model has none. A causal model
        without a stored head must be tied, unless the config says that it is not: configs leave the flag out when it
        has the family's default.
    """
    # Multimodal models have a head too. A translation model ties three tensors, so it is left out.
    if not (config.is_causal or config.is_multimodal) or config.ties_embeddings is False:
        return None
    modules = {module_of(t): t for t in tensors if is_weight(t)}
    # If the language model is a part of a larger model, its head has a prefix.
    if any(is_head(m) and not tower_of(m) for m in modules):
        return None
    if not can_list_head(config):
        return None
    embeddings = sorted((m for m in modules if m.rsplit(".", 1)[-1] in _EMBEDDING_NAMES), key=model_order)
    # A model with the embedding of an encoder, such as BLIP, has another head.
    if len(embeddings) != 1 or not (config.is_causal or embeddings[0].endswith("embed_tokens")):
        return None
    return "lm_head", modules[embeddings[0]]


def pick_groups(groups: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Return the groups that match any pattern, exactly or as a glob.

    A pattern must match the whole name.

    Raises:
        UsageError: no_such_group, a pattern matches no group.
    """
    names = sorted(set(groups), key=group_order)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(
                f"no group matches {pattern!r}",
                reason="no_such_group",
                hint=f"the groups are: {listed(names, 40)}",
            )
        chosen |= matched
    return chosen
