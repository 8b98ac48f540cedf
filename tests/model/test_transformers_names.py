"""The process that builds a model of transformers ends in time for any config."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrum_stream.errors import UsageError
from spectrum_stream.model import limited_process, transformers_names
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.transformers_names import InstalledModel

from ..support.families import tiny

OLMO: dict[str, Any] = {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
NAME = "model.layers.0.self_attn.q_proj.weight"
SWITCH = {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_model": 16,
    "d_ff": 16,
    "d_kv": 16,
    "num_heads": 1,
    "num_layers": 200,
    "num_sparse_encoder_layers": 100,
    "num_experts": 1000,
}


def reject(config: dict[str, Any], tensors: int = 14, rows: int = 128) -> str:
    """Return the message for a config that transformers does not build."""
    with pytest.raises(UsageError) as error:
        InstalledModel(ModelConfig(config), tensors, rows)
    assert error.value.reason == "unknown_architecture" and "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"num_hidden_layers": 10**6},
        {"num_labels": 10**9},
        {"text_config": {"n_routed_experts": 10**6}},
        {"layer_types": ["full_attention"] * 10**5},
        {"text_config": json.loads("[" * 90 + "]" * 90)},
    ],
)
def test_config_above_the_headers_starts_no_process(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.delattr(transformers_names, "LimitedProcess")
    assert "config.json" in reject(OLMO | more)


def test_parent_does_not_import_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is found without a process."""
    monkeypatch.delattr(transformers_names, "LimitedProcess")
    monkeypatch.setattr(transformers_names, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        InstalledModel(ModelConfig(OLMO), 14)
    assert error.value.reason == "missing_extra"


def test_process_that_cannot_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "cannot be started" in reject(OLMO)


def test_settings_that_could_name_code_are_left_out_at_every_depth() -> None:
    inner = {
        "attn_implementation": "a/b",
        "_attn_implementation_internal": "a/b",
        "_experts_implementation": "a/b",
        "use_kernels": True,
        "auto_map": {"AutoModel": "a.B"},
        "quantization_config": {"quant_method": "gptq"},
        "torch_dtype": "hub",
        "dtype": "utils",
    }
    kept = transformers_names._plain({**inner, "num_layers": 1, "a": {**inner, "b": [{**inner, "c": 2}, 3]}})
    assert kept == {"num_layers": 1, "a": {"b": [{"c": 2}, 3]}}


@pytest.mark.slow
def test_model_is_built_in_the_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tiny("gemma3")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    config = {**saved, "attn_implementation": "attacker/evil"}
    expected = {name: tuple(w.shape) for name, w in model.named_parameters(remove_duplicate=False)}
    with InstalledModel(ModelConfig(config), len(expected), 256) as found:
        assert found.built.shapes == expected and list(found.built.shapes) == list(expected)
        assert found.built.class_name == type(model).__name__
        old = "language_model.model.layers.0.mlp.up_proj.weight"
        new = "model.language_model.layers.0.mlp.up_proj.weight"
        assert found.find([old, "no.such.weight"]).keys() == {old}
        # Two tensors that would become one parameter are left out.
        assert found.find([old, new]) == {}
    # The process has ended, and its answers are kept.
    assert found.find([old])[old][1] == new


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rows", "says"),
    [
        (SWITCH, 128, "parameters, too many"),
        (OLMO | {"num_labels": 10**9}, 10**9, "memory is needed"),
        (OLMO | {"hidden_size": 10**15}, 128, ""),
        ({"model_type": "olmo3", "architectures": ["LlamaModel", "utils"], "hidden_size": {}}, 128, ""),
        (OLMO | {"to_dict": 1, "__class__": "str", "get_text_config": 5}, 128, ""),
    ],
)
def test_build_has_limits(config: dict[str, Any], rows: int, says: str) -> None:
    pytest.importorskip("transformers")
    # The machine may be so busy that the time is over first.
    assert re.search(rf"{says}|more than 20 s", reject(config, rows=rows))


@pytest.mark.slow
def test_build_that_is_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(transformers_names, "_BUILD_SECONDS", 0.001)
    assert "more than 0 s" in reject(OLMO)


@pytest.mark.slow
def test_build_sends_no_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It looks for no backbone, kernel or code that the config names."""
    pytest.importorskip("transformers")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setattr(limited_process, "_ENVIRONMENT", {})
        evil = {
            "attn_implementation": "a/b",
            "backbone": "a/b",
            "use_pretrained_backbone": True,
            "auto_map": {"A": "b"},
        }
        detr = {"model_type": "detr", "architectures": ["DetrModel"], "use_timm_backbone": False, **evil}
        for config in (OLMO | evil, detr):
            try:
                InstalledModel(ModelConfig(config), 14, 128).close()
            except UsageError as error:
                assert error.reason == "unknown_architecture"
        with pytest.raises(TimeoutError):
            server.accept()
