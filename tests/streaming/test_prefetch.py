"""The prefetcher on local shards; `checkpoint/test_hub.py` tests the other readers with a server."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from spectrum_stream.checkpoint import LocalShard
from spectrum_stream.errors import CheckpointError
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.schedule import Item
from spectrum_stream.streaming import ranged
from spectrum_stream.streaming.bounded import Budget, Budgets, Traffic
from spectrum_stream.streaming.decode import ShardReader, empty_matrix
from spectrum_stream.streaming.parts import PartReader
from spectrum_stream.streaming.plan import Plan, plan
from spectrum_stream.streaming.prefetch import Prefetcher

from ..support.checkpoints import Save, llama_tensors
from ..support.remote_shard import Remote


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


# Memory that is short


def short_for(matrices: set[str], original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of a reader fail for some of the matrices that it gets."""

    def method(self: object, matrix: Matrix) -> Any:
        if matrix.tensor in matrices:
            raise MemoryError
        return original(self, matrix)

    return method


@pytest.mark.parametrize("ahead_nbytes", [1, 10**9])
@pytest.mark.parametrize("short", [{0}, {3}, {2, 3, 4}, set(range(8))], ids=str)
def test_prefetcher_yields_no_memory_for_single_matrices(
    save: Save, monkeypatch: pytest.MonkeyPatch, short: set[int], ahead_nbytes: int
) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(8)}, shards=2)))
    names = {f"layers.{i}.up.weight" for i in short}
    monkeypatch.setattr(ShardReader, "read", short_for(names, ShardReader.read))
    found = all_of(prefetcher_of(a_plan, ahead_nbytes))
    assert [m for m, _ in found] == list(a_plan.matrices)
    assert {m.tensor for m, w in found if w is NoScore.NO_MEMORY} == names
    assert all(isinstance(w, torch.Tensor) for m, w in found if m.tensor not in names)


def test_prefetcher_yields_no_memory_for_a_shard_that_is_not_mapped(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_plan = plan(str(save({f"layers.{i}.up.weight": torch.ones(10, 10) for i in range(8)}, shards=2)))

    def open_some(path: Path, **options: Any) -> Any:
        if path.resolve().name.startswith("model-00001"):
            raise SafetensorError("Error while mapping: Cannot allocate memory (os error 12)")
        return safe_open(path, **options)

    monkeypatch.setattr("spectrum_stream.streaming.decode.safe_open", open_some)
    found = all_of(prefetcher_of(a_plan, 1))
    assert [w is NoScore.NO_MEMORY for _, w in found] == [True] * 4 + [False] * 4


def test_shard_reader_without_descriptors_raises_an_error_of_the_package(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3)})))

    def open_none(path: Path, **options: Any) -> Any:
        # The words of torch 2.13.
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Too many open files (24)")

    monkeypatch.setattr("spectrum_stream.streaming.decode.safe_open", open_none)
    with pytest.raises(CheckpointError) as error:
        all_of(prefetcher_of(a_plan))
    assert error.value.reason == "unreadable"


def test_part_reader_reads_the_parts_of_one_matrix_if_those_of_a_batch_do_not_fit(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(6):
        tensors[f"layers.{i}.up.weight"] = torch.ones(8, 8).to(torch.float8_e4m3fn)
        tensors[f"layers.{i}.up.weight_scale_inv"] = torch.ones(1, 1)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    a_plan = plan(str(save(tensors, config=config)))
    assert len(a_plan.matrices) == 6
    read, calls, short = LocalShard.read, 0, {0, 2, 3}

    def read_some(shard: LocalShard, start: int, stop: int) -> bytes:
        nonlocal calls
        calls += 1
        # The batches of six and five do not fit. The parts of the second matrix do not fit even alone.
        if calls - 1 in short:
            raise MemoryError
        return read(shard, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalShard, "read", read_some)
        prefetcher = prefetcher_of(a_plan)
        with prefetcher:
            found = []
            for item in prefetcher:
                if item is not None:
                    found.append(item)
                    prefetcher.release(item[0])
    assert [m for m, _ in found] == list(a_plan.matrices)
    assert sum(w is NoScore.NO_MEMORY for _, w in found) == 1
    assert prefetcher._budgets.parts.taken == 0


def test_prefetcher_whose_thread_is_gone_raises(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3)})))
    monkeypatch.setattr(Prefetcher, "_run", lambda self: None)
    with pytest.raises(MemoryError):
        all_of(prefetcher_of(a_plan))


class InMemory(Remote):
    """A remote shard that answers at once."""

    def stream(
        self, start: int, stop: int, write: Callable[[int, bytes], object], halt: threading.Event | None = None
    ) -> None:
        body = self.read(start, stop)
        for at in range(0, len(body), 100):
            write(start + at, body[at : at + 100])


@pytest.mark.parametrize("fails", ["buffer", "request"])
def test_read_ranged_skips_only_the_matrices_without_memory(
    save: Save, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    tensors = {f"layers.{i}.up.weight": torch.randn(10, 10) for i in range(8)}
    a_plan = plan(str(save(tensors)))
    shard = InMemory("model.safetensors", a_plan.source.shards[0], is_ranged=True)
    short = a_plan.matrices[3]
    make = empty_matrix

    def make_some(matrix: Matrix) -> tuple[torch.Tensor, memoryview]:
        if fails == "buffer" and matrix == short:
            raise MemoryError
        return make(matrix)

    def stream(self: InMemory, start: int, stop: int, write: Any, halt: object = None) -> None:
        if fails == "request" and start < short.start + short.nbytes and short.start < stop:
            raise MemoryError
        original(self, start, stop, write)

    original = InMemory.stream
    monkeypatch.setattr(InMemory, "stream", stream)
    monkeypatch.setattr(ranged, "empty_matrix", make_some)
    monkeypatch.setattr(ranged, "plan_requests", lambda extents: extents)
    ahead = Budget(1000)
    parts = PartReader({}, a_plan.matrices, Budget(None), int)
    found = []
    for matrix, w, release in ranged.read_ranged(
        shard, a_plan.matrices, parts, ahead=ahead, on_bytes=int, halt=threading.Event()
    ):
        found.append((matrix, w))
        release()
    assert [m for m, _ in found] == list(a_plan.matrices)
    for matrix, w in found:
        if matrix == short:
            assert w is NoScore.NO_MEMORY
        else:
            assert isinstance(w, torch.Tensor) and torch.equal(w, tensors[matrix.tensor])
    assert ahead.taken == 0
