"""Tiny models of every family, made by transformers.

Families share the names of their settings, so a config is shrunk by these names; `MORE` has the exceptions.
`python -m tests.support.families` writes the names of their parameters into `spectrum_stream/model/families.json`,
and the table of families into the README of the stage `model`.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spectrum_stream.model import families
from spectrum_stream.model.family_names import DATA

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    # GPT-2, T5, MPT and others
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 48, "d_model": 64, "n_layers": 2, "n_heads": 4,
    "ffn_hidden_size": 48, "d_ff": 48, "d_kv": 16, "num_heads": 4, "num_layers": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1, "shared_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "decoder_sparse_step": 1, "mlp_intermediate_size": 24, "expert_ffn_hidden_size": 24,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    # state spaces and linear attention
    "state_size": 16, "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 2, "expand": 2, "ssm_state_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 2, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 64, "mlp_ratio": 1,
    "num_position_embeddings": 16, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "mlp_dim": 40, "window_size": 2,
    "global_attn_indexes": [0], "output_channels": 32, "num_global_layers": 1,
}  # fmt: skip
# More settings that a family needs.
MORE: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "conv_L_cache": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    **dict.fromkeys(("vit", "clip_vision_model", "siglip_vision_model"), VISION),
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "distilbert": {"dim": 64, "hidden_dim": 48},
    "albert": {"num_hidden_groups": 2},
}
# All families that are built, as the vision-language model if there is one, else as the causal language model.
TABLE = (
    *("mixtral", "minimax", "minimax_m2", "phimoe"),
    *("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "flex_olmo", "qwen3_next"),
    *("ernie4_5_moe", "dots1", "hunyuan_v1_moe", "afmoe", "exaone_moe"),
    *("granitemoe", "granitemoeshared", "granitemoehybrid", "lfm2_moe", "jamba", "nemotron_h", "jetmoe", "gpt_oss"),
    *(
        "llava",
        "llava_next",
        "vipllava",
        "gemma3",
        "paligemma",
        "mistral3",
        "internvl",
        "aya_vision",
        "got_ocr2",
        "aria",
    ),
    *("mllama", "clip", "siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("llama4", "gpt_neox", "exaone4", "vit", "deepseek_v4"),
    # Families that keep their names.
    *("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "glm4", "cohere2", "olmo2", "smollm3"),
    *("gpt2", "gpt_bigcode", "falcon", "bloom", "mpt", "bert", "roberta", "modernbert", "t5", "mamba", "bamba"),
    *("mamba2", "falcon_h1", "idefics3", "smolvlm", "persimmon", "starcoder2", "stablelm", "opt"),
    *("cohere", "falcon_mamba", "gemma3_text", "glm", "gptj", "granite", "olmo"),
    *("xlm-roberta", "distilbert", "electra", "camembert", "mpnet", "albert", "deberta-v2", "bart", "mbart", "mt5"),
    *("umt5", "gpt_neo", "codegen", "arcee", "apertus", "ernie4_5", "helium", "hunyuan_v1_dense", "lfm2", "nemotron"),
    *("seed_oss", "clip_text_model", "clip_vision_model", "siglip_vision_model"),
)
# Families that cannot be compared with transformers here, with the reason.
NOT_BUILT = {
    "gemma3n": "its vision tower is timm's, another library",
    "qwen2_5_omni": "its talker and thinker are separate models, and trainers use the thinker's names",
    "kimi_k25": "a stored tensor of its vision tower becomes three parameters, which have no separate scores",
    "molmo2": "one stored tensor becomes several parameters, which have no separate scores",
    "exaone": "its code is in the repo and is not run; its names are those of the checkpoint",
    "dbrx": "its config class of transformers 5.24 makes no model",
}


def shrunk(config_class: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a config of this class small."""
    settings = set(inspect.signature(config_class.__init__).parameters)
    for one in config_class.__mro__:
        settings |= set(getattr(one, "__annotations__", {}))
    small = {name: value for name, value in sizes.items() if name in settings}
    for name, inner in (config_class.sub_configs or {}).items():
        if inner.__name__ == "AutoConfig":
            # The default config has the class.
            default = getattr(config_class(), name)
            if default is None:
                continue
            inner = type(default)
        small[name] = inner(**shrunk(inner, VISION if "vision" in name else TEXT)).to_dict()
    return small


def tiny(family: str, class_name: str | None = None, settings: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Build a model of a family with random weights, of the class that most trainers load if none is given."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config_class = transformers.CONFIG_MAPPING[family]
    config = config_class(**(shrunk(config_class, TEXT) | MORE.get(family, {}) | dict(settings)))
    names = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family)
        or auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
        or auto.MODEL_MAPPING_NAMES[family]
    )
    torch.manual_seed(0)
    model = getattr(transformers, class_name or (names if isinstance(names, str) else names[0]))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that all start at zero, or equal, would have the same score under any name.
            if parameter.is_floating_point() and parameter.unique().numel() <= 1:
                parameter.normal_(1, 0.1)
    return model


@dataclass(frozen=True, slots=True)
class Published:
    """The difference between a file that transformers saves today and the file that was published.

    Attributes:
        source: the repo of the file.
        class_name: the class in its config.json.
        rename: the published name by the name that is saved today; None for a tensor that was not published.
        extra: more published tensors, which transformers does not load: name and shape.
        copies: tensors that were published once more, under another name: that name and the name of the original.
        settings: settings of its config.json that differ from the defaults of the family.
    """

    source: str
    class_name: str
    rename: Callable[[str], str | None] = str
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def _old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _without(prefix: str) -> Callable[[str], str | None]:
    return lambda name: None if name == "lm_head.weight" else name.removeprefix(prefix)


_POSITIONS = (1, 64)
_POOLER = {"pooler.dense.weight": (64, 64), "pooler.dense.bias": (64,)}


def _extra_of(prefix: str, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in tensors.items()}


def _in_layers(pattern: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {pattern.format(layer): shape for layer in range(2)}


PUBLISHED: Mapping[str, Published] = {
    "gpt2": Published(
        "openai-community/gpt2",
        "GPT2LMHeadModel",
        _without("transformer."),
        _in_layers("h.{}.attn.bias", (1, 1, 64, 64)),
    ),
    "bloom": Published("bigscience/bloom-560m", "BloomForCausalLM", _without("transformer.")),
    "falcon": Published(
        "tiiuae/falcon-7b",
        "FalconForCausalLM",
        copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
    "bert": Published(
        "google-bert/bert-base-uncased",
        "BertForMaskedLM",
        lambda name: None if "decoder" in name else _old_norms(name),
        _extra_of("bert.", _POOLER)
        | {"bert.embeddings.position_ids": _POSITIONS}
        | {"cls.seq_relationship.weight": (2, 64), "cls.seq_relationship.bias": (2,)},
    ),
    "qwen3": Published(
        "Qwen/Qwen3-Embedding-0.6B",
        "Qwen3ForCausalLM",
        _without("model."),
        settings={"tie_word_embeddings": True},
    ),
    "t5": Published(
        "google-t5/t5-small",
        "T5ForConditionalGeneration",
        extra={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)},
        copies={f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")},
    ),
    "vit": Published("google/vit-base-patch16-224-in21k", "ViTModel"),
    "clip": Published(
        "openai/clip-vit-base-patch32",
        "CLIPModel",
        extra={f"{part}_model.embeddings.position_ids": _POSITIONS for part in ("text", "vision")},
    ),
    "roberta": Published(
        "FacebookAI/roberta-base",
        "RobertaForMaskedLM",
        lambda name: None if "decoder" in name else name,
        _extra_of("roberta.", _POOLER) | {"roberta.embeddings.position_ids": _POSITIONS},
    ),
    "xlm-roberta": Published(
        "FacebookAI/xlm-roberta-base",
        "XLMRobertaForMaskedLM",
        lambda name: None if "decoder" in name else name,
        _extra_of("roberta.", _POOLER) | {"roberta.embeddings.position_ids": _POSITIONS},
    ),
    "distilbert": Published(
        "distilbert/distilbert-base-uncased",
        "DistilBertForMaskedLM",
        lambda name: None if name == "vocab_projector.weight" else name,
    ),
    "electra": Published(
        "google/electra-base-discriminator",
        "ElectraForPreTraining",
        extra={"electra.embeddings.position_ids": _POSITIONS},
    ),
    "gpt_neox": Published(
        "EleutherAI/pythia-70m",
        "GPTNeoXForCausalLM",
        extra=_in_layers("gpt_neox.layers.{}.attention.bias", (1, 1, 64, 64))
        | _in_layers("gpt_neox.layers.{}.attention.masked_bias", ())
        | _in_layers("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", (8,)),
    ),
    "llama": Published(
        "meta-llama/Llama-2-7b-hf",
        "LlamaForCausalLM",
        extra=_in_layers("model.layers.{}.self_attn.rotary_emb.inv_freq", (8,)),
    ),
    "opt": Published("facebook/opt-350m", "OPTForCausalLM", _without("model.")),
    "mistral": Published("mistralai/Mistral-7B-v0.1", "MistralForCausalLM"),
    "mixtral": Published("mistralai/Mixtral-8x7B-v0.1", "MixtralForCausalLM"),
    "phi": Published("microsoft/phi-2", "PhiForCausalLM"),
}


def publish(family: str, folder: Path) -> None:
    """Write a tiny model with the names of its published file."""
    import torch
    from safetensors.torch import load_file, save_file

    how = PUBLISHED[family]
    tiny(family, how.class_name, how.settings).save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    tensors = {there: w for name, w in saved.items() if (there := how.rename(name)) is not None}
    tensors |= {name: torch.randn(shape) for name, shape in how.extra.items()}
    tensors |= {name: tensors[original].clone() for name, original in how.copies.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


README = Path(families.__file__).parent / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"


def render_table() -> str:
    """Render the table of families as markdown."""
    renamed = [family for family in TABLE if families.V5.get(family)]
    kept = [family for family in TABLE if family not in renamed]
    published = [f"{family} ({how.source})" for family, how in PUBLISHED.items()]
    lines = [
        "| family | names with `--names transformers-v5` |",
        "|---|---|",
        f"| {', '.join(kept)} | those of the checkpoint, with the prefix of the class; tested as saved |",
        f"| {', '.join(renamed)} | changed; tested as saved |",
        f"| {', '.join(published)} | also tested as published |",
    ]
    lines += [f"| {family} | not tested: {reason} |" for family, reason in NOT_BUILT.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    family_names = importlib.import_module("tests.support.family_names")
    DATA.write_text(family_names.render(), "utf-8")
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{render_table()}\n{END}{rest.partition(END)[2]}", "utf-8")
