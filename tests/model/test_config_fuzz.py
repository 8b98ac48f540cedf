"""A plan with any config ends in a result or an error of the package, in time."""

import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream import plan
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.config_limits import find_excess
from spectrum_stream.model.transformers_names import InstalledModel

from ..support.checkpoints import llama_tensors, write_checkpoint
from ..support.configs import FAMILIES, HOSTILE, QUANTIZATIONS, find_places, read_all, real_config

pytest.importorskip("transformers")


CLASSES = {"llama": "LlamaForCausalLM", "bart": "BartModel", "vit": "ViTModel", "clip": "CLIPModel"}


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """Change settings of a real config, at any depth, or move them to other keys."""
    config = real_config(draw(st.integers(0, len(FAMILIES) - 1)))
    for _ in range(draw(st.integers(1, 6))):
        container, key = draw(st.sampled_from(list(find_places(config)) or [(config, "a")]))
        value = draw(st.sampled_from([*HOSTILE, *QUANTIZATIONS, config.get("text_config"), config.get("model_type")]))
        if isinstance(container, dict) and draw(st.booleans()):
            key = draw(st.sampled_from(["text_config", "vision_config", "num_hidden_layers", "num_experts", key]))
        # A value must not contain itself.
        container[key] = deepcopy(value)
    return json.loads(json.dumps(config))


@given(configs())
def test_config_of_any_change_is_read_within_limits(config: Any) -> None:
    read_all(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = llama_tensors(1) | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(4, 6)}
    return write_checkpoint(tmp_path_factory.mktemp("fuzz"), tensors)


@given(config=configs())
@settings(max_examples=60)
def test_plan_with_any_config_ends_in_a_result_or_an_error_of_the_package(config: Any, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    started = time.monotonic()
    for names in ("transformers-v5", "checkpoint"):
        try:
            plan(str(folder), names=names)
        except SpectrumStreamError as error:
            assert error.reason and "\n" not in str(error) and len(str(error)) < 2000
    # A plan without transformers takes milliseconds; the machine may be busy.
    assert time.monotonic() - started < 30


def test_real_configs_have_no_excess() -> None:
    for i in range(len(FAMILIES)):
        assert find_excess(real_config(i), 9, 64) is None, FAMILIES[i]


@pytest.mark.slow
@given(configs())
@settings(max_examples=5)
def test_build_with_any_config_ends_in_a_model_or_an_error_of_the_package(config: Any) -> None:
    config["architectures"] = [CLASSES.get(str(config.get("model_type")), "BertModel")]
    try:
        InstalledModel(ModelConfig(config), 14, 128).close()
    except SpectrumStreamError as error:
        assert error.reason == "unknown_architecture" and "\n" not in str(error)
