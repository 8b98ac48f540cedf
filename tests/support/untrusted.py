"""Check the rules that hold for any bytes of an untrusted text.

The tests with hypothesis and the fuzzers use these checks."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrum_stream.checkpoint.index import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    MODULES_FILE,
    QUANTIZATION_FILES,
    choose_for,
    find_modules,
    is_one_of_several,
    is_safe_shard_name,
    missing_shards,
    parse_small,
    read_adapter_config,
    read_config,
)
from spectrum_stream.errors import BadIndex, FileError, SourceError, UsageError
from spectrum_stream.model.config import ModelConfig, QuantizationConfig
from spectrum_stream.model.parameters import read_names

_INDEX_REASONS = {"bad_index", "unsafe_shard_name", "no_index", "slices", "missing_shard", "file_too_large"}
# A sentence is not as long as the text that it is about.
_LONGEST_MESSAGE = 3000
INDEX = "model.safetensors.index.json"
FOLDERS = (
    (INDEX,),
    (INDEX, "model.safetensors"),
    (INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "a.safetensors"),
    ("x.safetensors.index.json", "x-00001-of-00003.safetensors", "y.safetensors"),
    ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.safetensors"),
    (INDEX, "x.safetensors.index.json", "pytorch_model.bin", "rank0.safetensors"),
)


def check_index(data: bytes, others: tuple[str, ...] = ()) -> None:
    """Check the choice of shards by any index, in folders with any other files."""
    for folder in FOLDERS:
        files = list(dict.fromkeys((*folder, *others)))
        for file in (None, files[0], files[-1]):
            try:
                choice = choose_for(file, files, lambda name: parse_small(data, name), "HERE")
                is_one_of_several(files[-1], files, lambda name: parse_small(data, name))
            except (BadIndex, SourceError, FileError) as error:
                assert error.reason in _INDEX_REASONS
                assert len(f"{error}{error.hint}") < _LONGEST_MESSAGE
                continue
            if choice is None or not choice.names:
                continue
            assert all(map(is_safe_shard_name, choice.names)) if choice.index else set(choice.names) <= set(files)
            assert choice.weight_map is None or set(choice.weight_map.values()) == set(choice.names)
            assert all(len(warning) < _LONGEST_MESSAGE for warning in choice.warnings)
            missing = missing_shards("HERE", choice.index, choice.names, files)
            assert len(f"{missing}{missing.hint}") < _LONGEST_MESSAGE


def check_config(data: bytes) -> None:
    """Check the types of all values, with any bytes as each small file."""

    def read_json(name: str) -> Any:
        return parse_small(data, name)

    files = [CONFIG_FILE, ADAPTER_CONFIG_FILE, MODULES_FILE]
    for some in (files, [*files, *QUANTIZATION_FILES]):
        try:
            config, quantization, warnings = read_config(some, read_json, "HERE")
            adapter = read_adapter_config(some, read_json)
            warnings += find_modules(some, read_json)
        except FileError as error:
            assert error.reason == "file_too_large"
            continue
        assert all(len(warning) < _LONGEST_MESSAGE for warning in warnings)
        assert isinstance(adapter, Mapping)
        _check_model(ModelConfig(config, quantization))
        choose_for(None, ["model.safetensors"], read_json, "HERE", config)


def _check_model(config: ModelConfig) -> None:
    assert config.model_type is None or isinstance(config.model_type, str)
    assert all(isinstance(name, str) for name in config.architectures)
    assert isinstance(config.text, Mapping)
    for count in (config.layer_count, config.expert_count, *config.other_counts):
        assert count is None or (type(count) is int and count > 0)
    assert {type(config.is_causal), type(config.is_multimodal), type(config.has_code)} == {bool}
    assert config.ties_embeddings in (None, True, False)
    for found in (config.quantization, QuantizationConfig(config.data)):
        _check_quantization(found)


def _check_quantization(config: QuantizationConfig) -> None:
    def is_size(value: Any) -> bool:
        return type(value) is int and value > 0

    assert config.quant_method is None or isinstance(config.quant_method, str)
    assert config.bits is None or (type(config.bits) is int and 1 <= config.bits <= 8)
    assert config.group_size is None or is_size(config.group_size)
    assert config.block_sizes and all(len(block) == 2 for block in config.block_sizes)
    assert all(is_size(side) for block in config.block_sizes for side in block)
    assert all(type(bits) is int and 1 <= bits <= 8 for bits, _ in config.packed_integers)
    assert all(size is None or is_size(size) for _, size in config.packed_integers)
    assert config.symmetric in (None, True, False)
    assert {type(flag) for flag in (config.is_dense, config.has_zeros, config.has_no_zeros, config.has_order)} == {
        bool
    }
    assert config.numbers is None or isinstance(config.numbers, tuple)


def check_names(data: bytes) -> None:
    """Check the names that any bytes give as a list of names."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(data)
        try:
            names = read_names(path)
        except (FileError, UsageError) as error:
            assert error.reason in ("file_too_large", "no_names")
            assert len(f"{error}{error.hint}") < _LONGEST_MESSAGE
            return
    assert names and all(isinstance(name, str) for name in names)
    assert sum(map(len, names)) <= len(data)
