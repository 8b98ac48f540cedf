"""Files with a part of each weight are rejected: slices by rank, and unfinished downloads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.tensors import read_checkpoint
from spectrum_stream.errors import SpectrumStreamError

WEIGHTS = {"layers.0.weight": torch.ones(2, 3)}


def reason_of(folder: Path, name: str = "") -> str | None:
    try:
        read_checkpoint(open_source(str(folder / name)))
    except SpectrumStreamError as error:
        return error.reason
    return None


def write(folder: Path, *names: str, **metadata: str) -> Path:
    for name in names:
        save_file(WEIGHTS, folder / name, metadata=metadata)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["model-rank-0-part-0", "model-rank-1-part-0"],
        ["model0-mp2", "model1-mp2"],
        ["model3-mp16"],
        ["shard-00001-model-00001-of-00001", "shard-00002-model-00001-of-00001"],
        ["rank0", "rank1"],
    ],
)
def test_slices_by_rank_are_rejected_as_a_folder_and_as_a_file(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, *(f"{name}.safetensors" for name in names))
    assert reason_of(tmp_path) == "slices"
    if names != ["rank0", "rank1"]:
        assert reason_of(tmp_path, f"{names[0]}.safetensors") == "slices"


@pytest.mark.parametrize(("ranks", "reason"), [(1, None), (2, "slices")])
def test_the_file_of_one_rank_is_rejected_if_the_config_has_more(
    tmp_path: Path, ranks: int, reason: str | None
) -> None:
    write(tmp_path, "rank0.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"mapping": {"tp_size": ranks}}))
    assert reason_of(tmp_path) == reason


@pytest.mark.parametrize("name", ["model0-mp1", "model", "ranking"])
def test_whole_weights_with_similar_names_are_read(tmp_path: Path, name: str) -> None:
    assert reason_of(write(tmp_path, f"{name}.safetensors")) is None


@pytest.mark.parametrize(("offsets", "reason"), [([0, 0], None), ([0, 3], "slices"), ("x", "slices")])
def test_slices_by_the_metadata_of_torch_are_rejected(tmp_path: Path, offsets: object, reason: str | None) -> None:
    info = json.dumps({"layers.0.weight": {"saved_offsets": offsets}})
    assert reason_of(write(tmp_path, "model.safetensors", DCP_SHARDING_INFO=info)) == reason


def test_a_download_with_the_state_of_aria2_beside_it_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors.aria2").touch()
    assert reason_of(tmp_path) == reason_of(tmp_path, "model.safetensors") == "unfinished"


@pytest.mark.parametrize("suffix", [".part", ".crdownload", ".incomplete"])
def test_a_folder_with_an_unfinished_download_only_says_so(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model.safetensors{suffix}").touch()
    with pytest.raises(SpectrumStreamError, match="interrupted"):
        open_source(str(tmp_path))


def test_a_tensor_without_a_dtype_is_rejected_before_the_scan(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "", "shape": [], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert reason_of(tmp_path) == "bad_tensor_entry"


def test_config_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8-sig")
    assert open_source(str(tmp_path)).config == {"model_type": "llama"}


def test_an_index_of_the_single_file_is_no_second_copy(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors")
    index = {"weight_map": {"layers.0.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_source(str(tmp_path)).warnings == ()
    assert reason_of(tmp_path, "model.safetensors.index.json") is None


def test_weights_in_other_folders_of_sentence_transformers_are_named(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors")
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (warning,) = open_source(str(tmp_path)).warnings
    assert "2_Dense" in warning
    assert "Pooling" not in warning
