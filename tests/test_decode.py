import threading
from pathlib import Path

import pytest
import torch

from spectrum_stream.decode import ShardReader, read_ahead
from spectrum_stream.errors import CheckpointError
from spectrum_stream.planning import Plan, plan
from spectrum_stream.source import Shard

from .conftest import Save, llama_tensors


def shards_of(a_plan: Plan) -> dict[str, Shard]:
    return {s.name: s for s in a_plan.source.shards}


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "reader"]


@pytest.mark.parametrize("ahead_nbytes", [0, 1, 3000, 10**9])
def test_tensors_come_as_they_are_stored_and_in_order(save: Save, ahead_nbytes: int) -> None:
    tensors = llama_tensors(3)
    a_plan = plan(str(save(tensors, shards=3)))
    found = list(read_ahead(shards_of(a_plan), a_plan.matrices, ahead_nbytes))
    assert [m for m, _ in found] == list(a_plan.matrices)
    for matrix, w in found:
        stored = tensors[matrix.tensor]
        assert torch.equal(w, stored if stored.ndim == 2 else stored[None]) and w.dtype == stored.dtype


def test_the_reader_waits_when_it_is_far_enough_ahead(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(20)})))
    read: list[int] = []
    stream = read_ahead(shards_of(a_plan), a_plan.matrices, 3 * 400)
    monkeypatch.setattr(ShardReader, "warm", lambda self, start, nbytes, scratch: read.append(start))
    next(stream)
    threading.Event().wait(0.2)
    assert len(read) <= 1 + 3
    assert len(list(stream)) == 19 and len(read) == 20


def test_a_consumer_that_leaves_stops_the_reader(save: Save) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(20)})))
    stream = read_ahead(shards_of(a_plan), a_plan.matrices, 400)
    next(stream)
    assert readers()
    stream.close()  # type: ignore[attr-defined]
    assert not readers()


def test_a_tensor_outlives_the_reader(save: Save) -> None:
    a_plan = plan(str(save({"a.weight": torch.arange(6.0).reshape(2, 3)})))
    ((_, w),) = read_ahead(shards_of(a_plan), a_plan.matrices)
    assert w.sum() == 15


def test_a_shard_that_is_gone_is_an_error_where_the_tensors_are_awaited(save: Save) -> None:
    folder = save(llama_tensors(1), shards=2)
    a_plan = plan(str(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        list(read_ahead(shards_of(a_plan), a_plan.matrices))
    assert error.value.reason == "unreadable"


def test_a_fault_of_the_reader_itself_is_not_swallowed(save: Save, tmp_path: Path) -> None:
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3)})))
    with pytest.raises(KeyError):
        list(read_ahead({}, a_plan.matrices))
