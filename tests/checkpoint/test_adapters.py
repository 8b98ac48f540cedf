"""Adapters are rejected by name, whatever library wrote them; a model with a few adapter tensors is not."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import save_file

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.adapters import find_adapter
from spectrum_stream.checkpoint.tensors import read_checkpoint
from spectrum_stream.errors import CheckpointError
from spectrum_stream.streaming.plan import plan

from ..support.checkpoints import Save, llama_tensors

LAYERS = range(3)
MODEL = list(llama_tensors(3))


def names(pattern: str, *ends: str) -> list[str]:
    return [pattern.format(i=i) + end for i in LAYERS for end in ends]


ADAPTERS = {
    "peft": ("LoRA", names("base_model.model.model.layers.{i}.mlp.up_proj", ".lora_A.weight", ".lora_B.weight")),
    "peft, modules_to_save": (
        "LoRA",
        ["base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight", "base_model.model.lm_head.weight",
         "base_model.model.score.weight", "base_model.model.norm.weight"],
    ),
    "peft, DoRA": ("DoRA", names("h.{i}.q", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")),
    "peft, embedding": ("LoRA", ["base_model.embed.lora_embedding_A", "base_model.embed.lora_embedding_B"]),
    "peft, IA3": ("IA3", names("base_model.model.h.{i}.mlp", ".ia3_l")),
    "peft, prompt": ("prompt tuning", ["prompt_embeddings"]),
    "kohya": ("LoRA", names("lora_unet_down_blocks_{i}_to_q", ".lora_down.weight", ".lora_up.weight", ".alpha")),
    "kohya, DoRA": ("DoRA", names("lora_te_{i}", ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")),
    "LoHa": ("LoHa", names("lora_unet_{i}", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha")),
    "LoKr": ("LoKr", names("lycoris_{i}", ".lokr_w1", ".lokr_w2", ".alpha")),
    "LyCORIS, full": ("LyCORIS", names("lora_unet_{i}", ".diff", ".diff_b")),
    "diffusers": ("LoRA", names("unet.{i}.attn.to_q", ".lora.down.weight", ".lora.up.weight")),
    "diffusers, peft": ("LoRA", names("transformer.blocks.{i}.attn.to_q", ".lora_A.weight", ".lora_B.weight")),
    "diffusers, processor": ("LoRA", names("unet.{i}.processor.to_q_lora", ".down.weight", ".up.weight")),
    "diffusers, linear layer": ("LoRA", names("unet.{i}.to_q.lora_linear_layer", ".down.weight", ".up.weight")),
    "x-flux": ("LoRA", names("double_blocks.{i}.processor.qkv_lora1", ".down.weight", ".up.weight")),
    "Megatron-Bridge": (
        "LoRA",
        names("decoder.layers.{i}.linear_qkv.adapter", ".linear_in.weight", ".linear_out.weight"),
    ),
    "NeMo": ("LoRA", names("layers.{i}.adapter_layer.lora_kqv_adapter", ".linear_in.weight", ".linear_out.weight")),
    "hypernetwork": (
        "hypernetwork",
        [f"{size}.{part}.linear.{i}.{end}" for size in (320, 1280) for part in (0, 1) for i in (0, 2)
         for end in ("weight", "bias")],
    ),
    "hypernetwork, old": ("hypernetwork", ["768.0.linear1.weight", "768.0.linear2.weight"]),
    "peft, Bone": ("PEFT", names("base_model.model.layers.{i}.q_proj", ".bone_block")),
    "control-LoRA": (
        "control-LoRA",
        ["lora_controlnet", *names("input_blocks.{i}.0", ".up", ".down", ".bias", ".in_layers.0.weight")],
    ),
    "LyCORIS, GLoRA": ("LyCORIS", names("lora_unet_{i}", ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")),
    "parametrizations alone": ("LoRA", names("layers.{i}.fc1.parametrizations.weight", ".0.lora_A", ".0.lora_B")),
    "mlx": ("LoRA", names("model.layers.{i}.self_attn.q_proj", ".lora_a", ".lora_b")),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors"), ADAPTERS.values(), ids=ADAPTERS)
def test_find_adapter_recognizes_the_names_of_each_tool(kind: str, tensors: list[str]) -> None:
    adapter = find_adapter(tensors, "x.safetensors", None)
    assert adapter is not None
    assert (adapter.kind, adapter.is_alone) == (kind, True)


MODELS = {
    "Llama": MODEL,
    "RWKV-7": names("model.layers.{i}.attn", ".w_lora.lora.0.weight", ".w_lora.lora.2.weight", ".k_proj.weight"),
    # https://github.com/huggingface/transformers/pull/44251
    "jina-embeddings-v3": names(
        "layers.{i}.mlp.fc1.parametrizations.weight", ".original", ".0.lora_A", ".0.lora_B", ".1.lora_A"
    ),
    "a model with a connector": [*MODEL, "vision_adapter.linear_in.weight", "vision_adapter.linear_out.weight"],
    "a list of modules": ["0.linear.weight", "0.linear.bias", "100.linear.0.weight", "2.0.linear.0.weight"],
    "snake activations": names("decoder.{i}", ".alpha", ".block.alpha", ".conv.weight"),
}


@pytest.mark.parametrize("tensors", MODELS.values(), ids=MODELS)
def test_find_adapter_finds_none_in_a_model(tensors: list[str]) -> None:
    assert find_adapter(tensors, "model.safetensors", None) is None
    # An adapter_config.json beside full weights is left over from something else.
    assert find_adapter(tensors, "model.safetensors", {"peft_type": "LORA"}) is None


@pytest.mark.parametrize(
    "model",
    [MODEL, names("model.layers.{i}.mlp.up_proj", ".base_layer.weight", ".lora_A.a.weight", ".lora_B.a.weight",
                  ".lora_A.b.weight", ".lora_B.b.weight")],
    ids=["merged", "unmerged, as in Phi-4-multimodal"],
)  # fmt: skip
def test_find_adapter_leaves_a_model_with_adapter_tensors_alone(model: list[str]) -> None:
    left = names("model.layers.{i}.mlp.up_proj", ".lora_A.default.weight", ".lora_B.default.weight")
    adapter = find_adapter([*model, *left], "model.safetensors", None)
    assert adapter is not None
    assert not adapter.is_alone
    assert adapter.names == {n for n in (*model, *left) if "lora_" in n}


@pytest.mark.parametrize("prefix", sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values())))
def test_find_adapter_knows_every_prefix_of_peft(prefix: str) -> None:
    tensors = names("base_model.model.model.layers.{i}.q_proj", f".{prefix}x", f".{prefix}A.weight")
    adapter = find_adapter(tensors, "x.safetensors", None)
    assert adapter is not None
    assert adapter.is_alone


def tiny_llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=16,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


TARGETS = ["q_proj", "up_proj"]
PEFT_CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=2, target_modules=TARGETS, total_step=10),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_plan_rejects_what_peft_saves_and_names_the_base_model(tmp_path: Path, make: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(), make())  # type: ignore[operator]
        model.peft_config["default"].base_model_name_or_path = "org/base"
        model.save_pretrained(str(tmp_path))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError) as error:
            plan(str(path))
        assert error.value.reason == "adapter"
        assert "org/base" in str(error.value)
    # The tensors alone are recognized too.
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        plan(str(tmp_path))
    assert error.value.reason == "adapter"


def test_read_checkpoint_rejects_an_adapter_by_its_file_and_config(save: Save) -> None:
    folder = save(llama_tensors(1))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base\x1b[31m"}))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(open_source(str(folder)))
    assert error.value.reason == "adapter"
    assert "org/base\\x1b" in str(error.value)


def test_read_checkpoint_names_the_base_model_of_an_image_adapter(tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 2) for name in ADAPTERS["kohya"][1]}
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_sd_model_name": "sdxl.safetensors"})
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(open_source(str(tmp_path / "style.safetensors")))
    assert error.value.reason == "adapter"
    assert "for sdxl.safetensors" in str(error.value)
    # This is the name of a file on the machine of the training.
    assert "sdxl" not in (error.value.hint or "")


def test_plan_ignores_left_over_adapter_tensors_with_a_warning(save: Save) -> None:
    tensors = llama_tensors(2)
    left = {f"model.layers.0.mlp.up_proj.lora_{x}.weight": torch.randn(4, 4) for x in "AB"}
    a_plan = plan(str(save(tensors | left)))
    assert not [w for w in a_plan.matrices if "lora" in w.module]
    assert any("2 tensors of an adapter" in w for w in a_plan.warnings)
    assert len(a_plan.matrices) == len(plan(str(save(tensors, folder="merged"))).matrices)
