"""The settings of single modules are found without a copy of the config for each."""

import time

from spectrum_stream.model.config import QuantizationConfig
from spectrum_stream.model.schemes.layers import Layers


def test_config_of_a_module_takes_no_longer_in_a_larger_config() -> None:
    modules = {f"model.layers.{i}.up_proj": {"bits": 4, "group_size": 64} for i in range(20_000)}
    for rules in ({}, {"dynamic": {"+:.*down_proj": {"bits": 8}}}):
        config = QuantizationConfig({"bits": 4, **modules, **rules})
        layers = Layers(config)
        start = time.process_time()
        assert all(layers.config_of(module) is config for module in modules)
        assert time.process_time() - start < 2


def test_config_of_a_module_has_its_own_settings_before_those_of_all() -> None:
    config = QuantizationConfig({"bits": 4, "group_size": 64, "dynamic": {"+:.*down_proj": {"bits": 8}}})
    found = Layers(config).config_of("model.layers.0.down_proj")
    assert isinstance(found, QuantizationConfig) and (found.bits, found.group_size) == (8, 64)
    assert Layers(config).config_of("model.layers.0.up_proj") is config
