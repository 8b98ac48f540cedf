"""The prefetcher on local shards; `checkpoint/test_hub.py` tests the other readers with a server."""

import threading
from pathlib import Path

import pytest
import torch

from spectrum_stream.errors import CheckpointError
from spectrum_stream.numerics.schedule import Item
from spectrum_stream.streaming.bounded import Budget, Budgets, Traffic
from spectrum_stream.streaming.decode import ShardReader
from spectrum_stream.streaming.plan import Plan, plan
from spectrum_stream.streaming.prefetch import Prefetcher

from ..support.checkpoints import Save, llama_tensors


def prefetcher_of(a_plan: Plan, mapped_nbytes: int = 10**9) -> Prefetcher:
    shards = {s.name: s for s in a_plan.source.shards}
    folder, budgets = a_plan.outputs.shards, Budgets(mapped=Budget(mapped_nbytes))
    return Prefetcher(shards, a_plan.matrices, a_plan.fetches, folder, Traffic(), budgets)


def all_of(prefetcher: Prefetcher) -> list[Item]:
    with prefetcher:
        return [item for item in prefetcher if item is not None]


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "reader"]


@pytest.mark.parametrize("ahead_nbytes", [0, 1, 3000, 10**9])
def test_prefetcher_yields_stored_tensors_in_order(save: Save, ahead_nbytes: int) -> None:
    tensors = llama_tensors(3)
    a_plan = plan(str(save(tensors, shards=3)))
    found = all_of(prefetcher_of(a_plan, ahead_nbytes))
    assert [m for m, _ in found] == list(a_plan.matrices)
    for matrix, w in found:
        stored = tensors[matrix.tensor]
        assert isinstance(w, torch.Tensor)
        assert torch.equal(w, stored if stored.ndim == 2 else stored[None])
        assert w.dtype == stored.dtype


def test_prefetcher_stops_at_the_mapped_budget(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(20)})))
    read: list[int] = []
    monkeypatch.setattr(ShardReader, "warm", lambda self, start, nbytes, scratch: read.append(start))
    with prefetcher_of(a_plan, 3 * 400) as prefetcher:
        items = (item for item in prefetcher if item is not None)
        next(items)
        threading.Event().wait(0.2)
        assert len(read) <= 1 + 3
        assert len(list(items)) == 19
        assert len(read) == 20


def test_prefetcher_exit_ends_the_thread(save: Save) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(20)})))
    with prefetcher_of(a_plan, 400) as prefetcher:
        next(item for item in prefetcher if item is not None)
        assert readers()
    assert not readers()


def test_prefetcher_yields_none_before_it_waits(save: Save) -> None:
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3)})))
    blocked = threading.Event()
    prefetcher = prefetcher_of(a_plan)
    original = ShardReader.warm

    def warm(self: ShardReader, start: int, nbytes: int, scratch: memoryview) -> None:
        assert blocked.wait(5)
        original(self, start, nbytes, scratch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardReader, "warm", warm)
        with prefetcher:
            items = iter(prefetcher)
            assert next(items) is None
            blocked.set()
            assert next(items) is not None


def test_prefetcher_tensor_outlives_the_thread(save: Save) -> None:
    a_plan = plan(str(save({"a.weight": torch.arange(6.0).reshape(2, 3)})))
    ((_, w),) = all_of(prefetcher_of(a_plan))
    assert isinstance(w, torch.Tensor)
    assert w.sum() == 15


def test_prefetcher_missing_shard_raises_in_the_iteration(save: Save) -> None:
    folder = save(llama_tensors(1), shards=2)
    a_plan = plan(str(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        all_of(prefetcher_of(a_plan))
    assert error.value.reason == "unreadable"


def test_prefetcher_bug_of_the_reader_raises_in_the_iteration(save: Save, tmp_path: Path) -> None:
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3)})))
    with pytest.raises(KeyError):
        all_of(Prefetcher({}, a_plan.matrices, a_plan.fetches, tmp_path / "shards", Traffic(), Budgets()))
