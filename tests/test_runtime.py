"""Names in memory: for tiny models that transformers makes and saves, every name of a result is a parameter's."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import freeze, plan, scan
from spectrum_stream.errors import UsageError
from spectrum_stream.results import read_scored
from spectrum_stream.scanning import MatrixScored

from .conftest import Save, llama_tensors, reference_score

pytestmark = pytest.mark.usefixtures("working_folder")

SIZE = {"vocab_size": 128, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def text(t: Any, kind: str, **more: Any) -> Any:
    return t.CONFIG_MAPPING[kind](**(SIZE | HEADS | TOKENS | more))


FAMILIES: dict[str, Callable[[Any], Any]] = {
    "llama": lambda t: t.LlamaForCausalLM(text(t, "llama")),
    "qwen3": lambda t: t.Qwen3ForCausalLM(text(t, "qwen3")),
    "gpt_neox": lambda t: t.GPTNeoXForCausalLM(text(t, "gpt_neox")),
    "mixtral": lambda t: t.MixtralForCausalLM(text(t, "mixtral", **EXPERTS)),
    "phimoe": lambda t: t.PhimoeForCausalLM(text(t, "phimoe", **EXPERTS)),
    "qwen2_moe": lambda t: t.Qwen2MoeForCausalLM(text(t, "qwen2_moe", shared_expert_intermediate_size=24, **EXPERTS)),
    "qwen3_moe": lambda t: t.Qwen3MoeForCausalLM(text(t, "qwen3_moe", **EXPERTS)),
    "olmoe": lambda t: t.OlmoeForCausalLM(text(t, "olmoe", **EXPERTS)),
    "deepseek_v3": lambda t: t.DeepseekV3ForCausalLM(
        text(
            t, "deepseek_v3", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=16,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=24,
            first_k_dense_replace=1,
        )
    ),
    "gpt_oss": lambda t: t.GptOssForCausalLM(text(t, "gpt_oss", **EXPERTS)),
    "granitemoe": lambda t: t.GraniteMoeForCausalLM(text(t, "granitemoe", **EXPERTS)),
    "llava": lambda t: t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=text(t, "llama"))
    ),
    "gemma3": lambda t: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            vision_config=t.SiglipVisionConfig(**VISION).to_dict(), text_config=text(t, "gemma3_text").to_dict()
        )
    ),
}  # fmt: skip


def saved(folder: Path, family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = FAMILIES[family](transformers)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_is_a_parameter_and_has_its_score(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "saved", family)
    result = scan(str(tmp_path / "saved"), name="x", top_percent=50, target="transformers")
    parameters = dict(model.named_parameters())
    tied = {r.module for r in result.records if r.module == "lm_head" and "lm_head.weight" not in parameters}
    published = {m for m in json.loads(Path("model_snr_results/snr_results_x.json").read_text()) if m not in tied}
    unknown = [m for m in published if f"{m}.weight" not in parameters and m not in parameters]
    assert not unknown and not result.plan.failures
    for module in published:
        w = parameters.get(f"{module}.weight", parameters.get(module))
        assert w is not None
        experts = [r.score.snr for r in result.records if (r.bank or r.module) == module and r.score]
        if w.ndim == 2:
            (line,) = [line for line in result.scored if line.module == module]
            assert line.snr == pytest.approx(reference_score(w), rel=1e-4), module
        elif w.ndim == 3:
            (line,) = [line for line in result.scored if line.module == module]
            assert line.snr == statistics.median(experts) and len(experts) % w.shape[0] == 0
    assert result.selection is not None and 0 < freeze(model, result.selection).trainable_share < 1


def test_names_change_and_no_score_is_computed_again(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    first = scan(str(tmp_path / "saved"), name="x")
    events: list[object] = []
    second = scan(str(tmp_path / "saved"), name="x", target="transformers", on_event=events.append)
    assert not [e for e in events if isinstance(e, MatrixScored)]
    names = {line.module for line in second.scored}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names and len(names) < len(first.scored)
    path = Path("model_snr_results/snr_results_x.json")
    assert read_scored(path).lines == tuple(second.scored) and not read_scored(path).notes
    back = scan(str(tmp_path / "saved"), name="x")
    assert back.scored == first.scored
    assert read_scored(path).lines == tuple(first.scored)
    assert json.loads(Path("model_snr_results/snr_results_x.json").read_text()).keys() == {
        s.module for s in first.scored
    }


def test_what_transformers_does_not_know_is_refused_or_named(save: Save) -> None:
    for config in (
        {},
        {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"},
        {"architectures": ["Pipeline"]},
    ):
        with pytest.raises(UsageError) as error:
            plan(str(save(llama_tensors(1), config=config)), target="transformers")
        assert error.value.reason == "unknown_architecture"
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), target="trainer")
    assert error.value.reason == "no_such_target"


def test_a_module_that_the_model_lacks_keeps_its_name_and_is_pointed_at(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "llama")
    path = tmp_path / "saved" / "model.safetensors"
    save_file(load_file(path) | {"model.mtp.0.eh_proj.weight": torch.randn(6, 9)}, path)
    a_plan = plan(str(tmp_path / "saved"), target="transformers")
    assert any("model.mtp.0.eh_proj" in warning for warning in a_plan.warnings)
    assert {w.bank for w in a_plan.matrices} == {None}


def test_gpt_oss_as_it_is_published_has_the_names_of_its_parameters(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from .test_quantised import mxfp4

    saved(tmp_path / "saved", "gpt_oss")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts, rows, columns = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(experts, columns, rows)
    save_file(tensors, path)
    a_plan = plan(str(tmp_path / "saved"), target="transformers")
    assert not a_plan.warnings and "model.layers.0.mlp.experts.gate_up_proj" in {w.bank for w in a_plan.matrices}


def test_a_bank_of_which_a_part_cannot_be_read_is_not_published_as_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "qwen3_moe")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    broken = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[broken] = tensors[broken].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    result = scan(str(tmp_path / "saved"), name="x", target="transformers")
    names = {line.module for line in result.scored}
    assert not result.complete and [s.tensor for s in result.plan.failures] == [broken]
    assert "model.layers.0.mlp.experts.gate_up_proj" not in names
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert any("gate_proj" in warning for warning in result.plan.warnings)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["AutoModel"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "many"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 0},
        {"architectures": [None, 5, {}], "model_type": "llama"},
        {"architectures": "LlamaForCausalLM", "model_type": ["llama"]},
    ],
)
def test_a_hostile_config_is_one_sentence(save: Save, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), target="transformers")
    assert error.value.reason == "unknown_architecture" and "\n" not in str(error.value)
