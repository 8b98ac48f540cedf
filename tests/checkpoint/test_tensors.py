import json
from pathlib import Path

import pytest
import torch

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.header import HeaderFault
from spectrum_stream.checkpoint.tensors import Checkpoint, read_checkpoint
from spectrum_stream.errors import BadHeader, CheckpointError

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


# transformers loads every tensor of each shard that the index names: `test_index_judge.py`.
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_0_weight": SECOND}, "layers.0.weight"),
        ({"layers_9_weight": SECOND}, "layers.9.weight"),
        ({"layers_3_weight": None}, "layers.3.weight"),
    ],
    ids=["wrong shard", "no shard", "not listed"],
)
def test_read_checkpoint_reads_the_shards_and_warns_if_the_index_differs(
    save: Save, changes: dict[str, str | None], said: str
) -> None:
    folder = save(WEIGHTS, shards=2)
    edit_index(folder, **changes)
    checkpoint = read(folder)
    assert [t.name for _, t in checkpoint.tensors] == list(WEIGHTS)
    assert any(said in w for w in checkpoint.warnings)


def test_read_checkpoint_reads_the_last_of_two_tensors(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    both = save({**WEIGHTS, "layers.0.weight": torch.zeros(2, 3)}, folder="both")
    (both / "model.safetensors").rename(folder / SECOND)
    checkpoint = read(folder)
    assert any("layers.0.weight" in w and "two shards" in w for w in checkpoint.warnings)
    assert {s.name for s, _ in checkpoint.tensors} == {SECOND}


def test_read_checkpoint_rejects_a_stub_and_names_the_shards_beside_it(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    save({name: torch.zeros(0) for name in WEIGHTS})
    with pytest.raises(CheckpointError) as error:
        read(folder)
    assert error.value.reason == "empty_weights"
    assert SECOND in str(error.value)
    assert len(read(folder / "model.safetensors.index.json").tensors) == 4


def test_read_checkpoint_names_a_truncated_shard(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    shard = folder / SECOND
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadHeader) as error:
        read(folder)
    assert error.value.reason == HeaderFault.TRUNCATED
    assert SECOND in str(error.value)


@pytest.mark.parametrize("nbytes", [*range(99_984, 100_010, 2), 300_000])
def test_read_header_around_the_probe_size_is_whole(tmp_path: Path, nbytes: int) -> None:
    entry = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = entry[:-1] + " " * (nbytes - len(entry)) + "}"
    (tmp_path / "model.safetensors").write_bytes(nbytes.to_bytes(8, "little") + header.encode() + b"\0" * 4)
    assert [t.name for _, t in read(tmp_path).tensors] == ["a.weight"]
