import json
from pathlib import Path

import pytest
import torch

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.header import HeaderFault
from spectrum_stream.checkpoint.tensors import Checkpoint, read_checkpoint
from spectrum_stream.errors import BadHeader, BadIndex

from ..support.checkpoints import Save

WEIGHTS = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}
SECOND = "model-00002-of-00002.safetensors"


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(open_source(str(folder)))


def edit_index(folder: Path, **changes: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, shard in changes.items():
        tensor = name.replace("_", ".")
        if shard is None:
            del index["weight_map"][tensor]
        else:
            index["weight_map"][tensor] = shard
    path.write_text(json.dumps(index))


def test_read_checkpoint_orders_tensors_by_shard_and_offset(save: Save) -> None:
    checkpoint = read(save(WEIGHTS, shards=2))
    assert [t.name for _, t in checkpoint.tensors] == list(WEIGHTS)
    assert [s.name[:11] for s, _ in checkpoint.tensors] == ["model-00001"] * 2 + ["model-00002"] * 2


def test_read_checkpoint_rejects_a_tensor_in_the_wrong_shard(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    edit_index(folder, layers_0_weight=SECOND)
    with pytest.raises(BadIndex) as error:
        read(folder)
    assert error.value.reason == "tensor_missing"


def test_read_checkpoint_rejects_a_missing_tensor(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    edit_index(folder, layers_9_weight=SECOND)
    with pytest.raises(BadIndex) as error:
        read(folder)
    assert error.value.reason == "tensor_missing"
    assert "layers.9.weight" in str(error.value)


def test_read_checkpoint_warns_about_unlisted_tensors(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    edit_index(folder, layers_3_weight=None)
    checkpoint = read(folder)
    assert [t.name for _, t in checkpoint.tensors] == list(WEIGHTS)[:3]
    assert any("layers.3.weight" in w for w in checkpoint.warnings)


def test_read_checkpoint_follows_the_index_for_duplicates(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    both = save({**WEIGHTS, "layers.0.weight": torch.zeros(2, 3)}, folder="both")
    (both / "model.safetensors").rename(folder / SECOND)
    checkpoint = read(folder)
    assert any("layers.0.weight" in w and "another shard" in w for w in checkpoint.warnings)
    owners = {t.name: s.name for s, t in checkpoint.tensors}
    assert owners["layers.0.weight"] != SECOND
    assert owners["layers.3.weight"] == SECOND


def test_read_checkpoint_names_a_truncated_shard(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    shard = folder / SECOND
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadHeader) as error:
        read(folder)
    assert error.value.reason == HeaderFault.TRUNCATED
    assert SECOND in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + b"\0" * 60, "zip archive"),
        (b"\x80\x02}q\x00" + b"\0" * 60, "pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"", "0 bytes"),
    ],
)
def test_read_header_recognizes_other_formats(save: Save, content: bytes, said: str) -> None:
    folder = save(WEIGHTS)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadHeader) as error:
        read(folder)
    assert said in str(error.value)


@pytest.mark.parametrize("nbytes", [*range(99_984, 100_010, 2), 300_000])
def test_read_header_around_the_probe_size_is_whole(tmp_path: Path, nbytes: int) -> None:
    entry = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = entry[:-1] + " " * (nbytes - len(entry)) + "}"
    (tmp_path / "model.safetensors").write_bytes(nbytes.to_bytes(8, "little") + header.encode() + b"\0" * 4)
    assert [t.name for _, t in read(tmp_path).tensors] == ["a.weight"]
