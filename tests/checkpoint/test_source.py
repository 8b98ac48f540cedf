import json
import os
from pathlib import Path

import pytest
import torch

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.index import is_safe_shard_name
from spectrum_stream.errors import BadIndex, SourceError, SpectrumStreamError
from spectrum_stream.streaming.plan import plan

from ..support.checkpoints import Save, llama_tensors, single_experts

WEIGHTS = {f"layers.{i}.weight": torch.ones(2, 3) for i in range(4)}


def refused(path: Path | str) -> SpectrumStreamError:
    with pytest.raises(SpectrumStreamError) as error:
        open_source(str(path))
    return error.value


def test_open_source_accepts_file_folder_and_shards(save: Save) -> None:
    folder = save(WEIGHTS)
    assert [s.name for s in open_source(str(folder)).shards] == ["model.safetensors"]
    assert [s.name for s in open_source(str(folder / "model.safetensors")).shards] == ["model.safetensors"]
    sharded = open_source(str(save(WEIGHTS, folder="sharded", shards=2)))
    assert [s.name for s in sharded.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sharded.weight_map is not None
    assert set(sharded.weight_map) == set(WEIGHTS)


def test_open_source_accepts_a_lone_file_of_any_name(save: Save) -> None:
    folder = save(WEIGHTS)
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    assert [s.name for s in open_source(str(folder)).shards] == ["adapter.safetensors"]


def test_open_source_warns_about_a_stray_shard(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"never opened")
    source = open_source(str(folder))
    assert len(source.shards) == 2
    assert source.ignored == ("consolidated.safetensors",)
    assert any("consolidated.safetensors" in w for w in source.warnings)


def test_open_source_prefers_the_single_file_to_the_index(save: Save) -> None:
    save(WEIGHTS, shards=2)
    source = open_source(str(save(WEIGHTS)))
    assert source.weight_map is None
    assert len(source.shards) == 1
    assert any("both" in w for w in source.warnings)
    index = open_source(source.other_index or "")
    assert len(index.shards) == 2


def test_open_source_follows_links_of_the_hub_cache(save: Save, tmp_path: Path) -> None:
    folder = save(WEIGHTS, shards=2)
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    source = open_source(str(snapshot))
    assert len(source.shards) == 2
    assert not source.warnings


def test_open_source_warns_about_links_out_of_a_folder(save: Save, tmp_path: Path) -> None:
    folder = save(WEIGHTS)
    elsewhere = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert any("linked" in w for w in open_source(str(folder)).warnings)


def test_open_source_rejects_a_dangling_link(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(folder / "gone")
    for path in (folder, shard):
        error = refused(path)
        assert isinstance(error, BadIndex)
        assert error.reason == "missing_shard"


def test_open_source_rejects_a_missing_path() -> None:
    assert refused("no/such/model").reason == "no_such_path"
    assert refused("no\0name").reason == "no_such_path"
    assert refused("~nosuchuser/model").reason == "no_such_path"
    assert refused("x" * 5000).reason in ("no_such_path", "unreadable")


@pytest.mark.parametrize(
    ("file", "said"), [("pytorch_model.bin", ".bin"), ("model.gguf", "GGUF"), ("notes.txt", "no weights")]
)
def test_open_source_lists_other_formats(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).touch()
    error = refused(tmp_path)
    assert isinstance(error, SourceError)
    assert error.reason == "no_safetensors"
    assert said in str(error)


def test_open_source_points_to_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "x.safetensors").touch()
    error = refused(tmp_path)
    assert error.reason == "no_safetensors"
    assert "transformer" in (error.hint or "")


def test_open_source_rejects_a_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert refused(tmp_path / "model.gguf").reason == "no_safetensors"


def test_open_source_reads_numbered_shards_without_an_index(save: Save) -> None:
    folder = save(WEIGHTS, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    source = open_source(str(folder))
    assert [s.name for s in source.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert any("without an index" in w for w in source.warnings)
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = refused(folder)
    assert error.reason == "missing_shard"
    assert "model-00002-of-00003" in str(error)


def test_open_source_rejects_a_missing_shard(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = refused(folder)
    assert error.reason == "missing_shard"
    assert "model-00002" in str(error)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_open_source_rejects_a_bad_index(save: Save, index: str) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert refused(folder).reason == "bad_index"


UNSAFE = [
    "../other/model.safetensors",
    "a/../../model.safetensors",
    "/etc/model.safetensors",
    "//host/share/model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "http://host/model.safetensors",
    "a\0b.safetensors",
    "a\nb.safetensors",
    "./model.safetensors",
    "a//model.safetensors",
    "%2e%2e/model.safetensors",
    "model.safetensors?download=1",
    "",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_open_source_rejects_shard_names_outside_the_folder(save: Save, name: str) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"layers.0.weight": name}}))
    assert refused(folder).reason == "unsafe_shard_name"


@pytest.mark.parametrize("name", ["model.safetensors", "unet/model-00001-of-00002.safetensors", "a b.safetensors"])
def test_is_safe_shard_name_accepts_subfolders(name: str) -> None:
    assert is_safe_shard_name(name)


def test_open_source_rejects_a_folder_named_like_a_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert refused(tmp_path).reason == "not_a_file"


@pytest.mark.parametrize("config", ["{", "[]", "\xff"])
def test_open_source_warns_about_a_bad_config(save: Save, config: str) -> None:
    folder = save(llama_tensors(1))
    (folder / "config.json").write_text(config, encoding="latin-1")
    source = open_source(str(folder))
    assert source.config == {}
    assert any("config.json" in w for w in source.warnings)


def test_open_source_warns_about_one_shard_of_many(save: Save) -> None:
    folder = save(llama_tensors(1), shards=2)
    shard = open_source(str(folder / "model-00001-of-00002.safetensors"))
    assert shard.is_part
    assert any("one shard" in w and str(folder) in w for w in shard.warnings)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "b.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text().replace("model-00002-of-00002", "b"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_source(str(folder / "b.safetensors")).is_part, "by the index"


def test_one_shard_claims_no_tied_head_and_no_missing_experts(save: Save) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_local_experts": 4}
    tensors = {"model.embed_tokens.weight": torch.randn(8, 4)} | single_experts(layers=1)
    folder = save(tensors, shards=2, config=config)
    first = plan(str(folder / "model-00001-of-00002.safetensors"))
    assert first.source.config == config
    assert not [w for w in first.matrices if w.tied_to]
    assert not first.failures
    assert [w for w in plan(str(folder)).matrices if w.tied_to]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_open_source_rejects_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert refused(tmp_path).reason == "not_a_file"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    assert refused(tmp_path).reason == "not_a_file"
    (tmp_path / "model.safetensors").unlink()
    for small in ("config.json", "quantize_config.json", "adapter_config.json", "x.safetensors.index.json"):
        (tmp_path / small).symlink_to("/dev/zero")
        (tmp_path / "a.safetensors").touch()
        assert refused(tmp_path / "a.safetensors").reason == "not_a_file"
        (tmp_path / small).unlink()
