"""Whole scans of real checkpoints and of models saved by transformers, compared with Spectrum and its formula."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from spectrum_stream import freeze, scan

from .support.checkpoints import GOLDEN, reference_score

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.mark.slow
def test_smollm2_has_spectrums_scores_order_and_files(smollm2: Path) -> None:
    result = scan(str(smollm2), name="smollm2", top_percent=50)
    found = json.loads(result.written[0].read_text())
    theirs = json.loads((GOLDEN / "snr_results_smollm2.json").read_text())
    assert list(found) == list(theirs)
    assert [e["type"] for e in found.values()] == [e["type"] for e in theirs.values()]
    for module, entry in theirs.items():
        assert found[module]["snr"] == pytest.approx(entry["snr"], rel=1e-4), module
    expected = (GOLDEN / "smollm2_unfrozenparameters_50percent.yaml").read_bytes()
    assert result.written[2].name == "snr_results_smollm2_unfrozenparameters_50percent.yaml"
    assert result.written[2].read_bytes() == expected
    sorted_file, theirs_sorted = (
        json.loads(p.read_text()) for p in (result.written[1], GOLDEN / "smollm2_sorted.json")
    )
    assert {g: list(m) for g, m in sorted_file.items()} == {g: list(m) for g, m in theirs_sorted.items()}


@pytest.mark.slow
def test_minilm_has_the_scores_of_the_formula(minilm: Path) -> None:
    result = scan(str(minilm), name="minilm", top_percent=50)
    assert len(result.records) == 53 and result.complete
    with safe_open(minilm / "model.safetensors", framework="pt") as file:
        for record in result.records:
            expected = reference_score(file.get_tensor(record.tensor))
            assert record.score is not None
            assert record.score.snr == pytest.approx(expected, rel=1e-5), record.module


def saved_model(folder: Path, kind: str) -> Any:
    """Make and save a tiny model with transformers."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = {"vocab_size": 128, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**size, **heads, **tokens),
        "tied llama": lambda: transformers.LlamaConfig(**size, **heads, **tokens, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=128, n_layer=3, n_embd=64, n_head=4, n_positions=32, **tokens
        ),
        "mixtral": lambda: transformers.MixtralConfig(**size, **heads, **tokens, num_local_experts=4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
        model.save_pretrained(folder)
    return model


def by_spectrums_rules(model: Any) -> dict[str, float]:
    """Score the instantiated modules that have a weight, like Spectrum."""
    return {
        name: reference_score(module.weight)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and name
    }


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_saved_models_score_like_the_instantiated_modules(tmp_path: Path, kind: str) -> None:
    expected = by_spectrums_rules(saved_model(tmp_path / "m", kind))
    found = {line.name: line.value for line in scan(str(tmp_path / "m"), name="x").modules}
    assert found == pytest.approx(expected, rel=1e-5)


def test_mixtral_scores_like_the_instantiated_modules_and_experts(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", "mixtral")
    found = {line.name: line.value for line in scan(str(tmp_path / "m"), name="x", names="checkpoint").modules}
    # transformers 5 keeps the experts of a layer in one parameter that is not a module, so that Spectrum
    # does not see it. The checkpoint has each expert's matrices, under the names that Spectrum's published
    # Mixtral results have.
    expected = {
        name.replace("mlp.gate", "block_sparse_moe.gate"): snr for name, snr in by_spectrums_rules(model).items()
    }
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for e in range(4):
            w1, w3 = experts.gate_up_proj[e].chunk(2)
            for name, w in (("w1", w1), ("w2", experts.down_proj[e]), ("w3", w3)):
                expected[f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}"] = reference_score(w)
    assert found == pytest.approx(expected, rel=1e-5)


def test_selection_of_a_scan_freezes_its_model(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "m", "tied llama")
    result = scan(str(tmp_path / "m"), name="x", top_percent=50)
    assert result.selection is not None
    report = freeze(model, result.written[2])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{module}.weight" for module in result.selection.chosen_names} | {"model.embed_tokens.weight"}
    assert trained == expected
    assert report.trainable_count == sum(p.numel() for p in model.parameters() if p.requires_grad)
