"""Checkpoints that change during a scan, full or read-only disks, and concurrent scans."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import scan
from spectrum_stream.errors import CheckpointError, ResultError, SpectrumStreamError
from spectrum_stream.pipeline import MatrixScored, ScanFinished, ScanStarted, run
from spectrum_stream.results.journal import Journal
from spectrum_stream.streaming.plan import plan

from .support.checkpoints import Save, llama_tensors
from .support.records import IDENTITY


def replaced(path: Path) -> None:
    """Replace the file by a rename, like downloads and editors."""
    other = path.with_suffix(".new")
    save_file(llama_tensors(1), other)
    other.rename(path)


def overwritten(path: Path) -> None:
    # The file is not cut first, because an access to the map of a cut file ends this process.
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [replaced, overwritten, cut, removed])
@pytest.mark.parametrize("after", [0, 1])
def test_scan_of_a_changing_shard_publishes_nothing(
    save: Save, working_folder: Path, change: Callable[[Path], None], after: int
) -> None:
    folder = save(llama_tensors(3), shards=2)
    scan(str(folder), name="x", top_percent=50)
    earlier = {path: path.read_bytes() for path in working_folder.rglob("*.*") if path.suffix in (".json", ".yaml")}
    # The checkpoint changes to have matrices to scan, and then changes again.
    os.utime(folder / "model-00001-of-00002.safetensors")
    a_plan = plan(str(folder), name="x")
    with pytest.raises(CheckpointError) as error:
        seen = 0
        if not after:
            change(folder / "model-00002-of-00002.safetensors")
        for event in run(a_plan, top_percent=50):
            seen += isinstance(event, MatrixScored)
            if after and seen == after:
                # The matrices of the first shard are in progress, and the bytes that were read are correct.
                change(folder / "model-00001-of-00002.safetensors") if change is not cut else overwritten(
                    folder / "model-00001-of-00002.safetensors"
                )
                after = 0
    assert error.value.reason in ("changed", "unreadable")
    assert {path: path.read_bytes() for path in earlier} == earlier


def test_scan_drops_scores_from_before_a_change(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(2))
    a_plan = plan(str(folder), name="x")
    with pytest.raises(CheckpointError):
        for event in run(a_plan):
            if isinstance(event, MatrixScored):
                overwritten(folder / "model.safetensors")
    events: list[object] = []
    result = scan(str(folder), name="x", on_event=events.append)
    assert sum(isinstance(e, MatrixScored) for e in events) == len(result.records)
    fresh = scan(str(folder), name="y")
    assert [r.score for r in result.records] == [r.score for r in fresh.records]


INDEX = "model.safetensors.index.json"
SMALL_FILES = {
    "config.json": {"rope_theta": 10_000},
    "quantize_config.json": {"bits": 4, "group_size": 32},
    "adapter_config.json": {"peft_type": "LORA"},
}


@pytest.mark.parametrize("name", [*SMALL_FILES, INDEX])
@pytest.mark.parametrize("is_there", [True, False])
def test_scan_notices_a_small_file_that_changes_meanwhile(
    save: Save, working_folder: Path, name: str, is_there: bool
) -> None:
    tensors = llama_tensors(2)
    folder = save(tensors, shards=2)
    path = folder / name
    is_there = is_there or name == INDEX
    content = json.loads(path.read_text()) if name == INDEX else {}
    if is_there and name != INDEX:
        path.write_text("{}")
    with pytest.raises(CheckpointError) as error:
        for event in run(plan(str(folder), name="x")):
            if isinstance(event, MatrixScored) and event.done == 3:
                # The index has another place for a tensor that is already planned.
                weight_map = content.get("weight_map", {}) | {next(iter(tensors)): "model-00002-of-00002.safetensors"}
                path.write_text(json.dumps({"weight_map": weight_map} if name == INDEX else SMALL_FILES[name]))
    assert error.value.reason == "changed"
    assert not list(working_folder.rglob("*.json"))


def test_scan_notices_a_config_that_is_gone_or_broken_meanwhile(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(2), config={"a": 1})
    for broken in (None, "{", "[" * 10_000):
        (folder / "config.json").write_text('{"a": 1}')
        with pytest.raises(CheckpointError) as error:
            for event in run(plan(str(folder), name="x"), fresh=True):
                if isinstance(event, MatrixScored) and event.done == 3:
                    (folder / "config.json").unlink()
                    if broken is not None:
                        (folder / "config.json").write_text(broken)
        assert error.value.reason == "changed"
    assert not list(working_folder.rglob("*.json"))


@pytest.mark.parametrize("model", ["m", "m/model.safetensors.index.json", "./m/"])
def test_run_of_a_relative_path_in_another_working_folder(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    folder = save(llama_tensors(1), shards=2)
    Path("m").symlink_to(folder)
    a_plan = plan(model, name="x")
    assert (a_plan.source.model, a_plan.source.name) == (model, model)
    (working_folder / "other").mkdir()
    monkeypatch.chdir("other")
    assert isinstance([*run(a_plan)][-1], ScanFinished)


def test_message_names_a_shard_by_the_path_that_was_given(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(1))
    Path("m").symlink_to(folder)
    a_plan = plan("m", name="x")
    overwritten(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^m/model\.safetensors was changed"):
        list(run(a_plan))


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors.aria2",
        "model.safetensors",
        "model-rank-0-part-0.safetensors",
        "other.safetensors.index.json",
        "other-00001-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize("has_index", [True, False])
def test_scan_accepts_other_files_that_come_meanwhile(save: Save, name: str, has_index: bool) -> None:
    folder = save(llama_tensors(1), shards=2, config={"a": 1})
    if not has_index:
        (folder / INDEX).unlink()
    done = False
    for event in run(plan(str(folder), name="x")):
        if isinstance(event, MatrixScored):
            (folder / name).write_text("{")
        done = isinstance(event, ScanFinished)
    assert done


def test_scan_notices_an_index_that_is_gone_or_broken_meanwhile(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(1), shards=2)
    content = (folder / INDEX).read_text()
    for broken in (None, "{", "[" * 10_000):
        (folder / INDEX).write_text(content)
        with pytest.raises(CheckpointError) as error:
            for event in run(plan(str(folder), name="x"), fresh=True):
                if isinstance(event, MatrixScored) and event.done == 3:
                    (folder / INDEX).unlink()
                    if broken is not None:
                        (folder / INDEX).write_text(broken)
        assert error.value.reason == "changed"
    assert not list(working_folder.rglob("*.json"))


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize("name", SMALL_FILES)
@pytest.mark.parametrize("done", [3, 100])
def test_scan_reuses_no_score_of_another_config(save: Save, name: str, done: int) -> None:
    folder = save(llama_tensors(2))
    for event in run(plan(str(folder), name="x")):
        if isinstance(event, MatrixScored) and event.done == done:
            break
    (folder / name).write_text(json.dumps(SMALL_FILES[name]))
    first, *scored = [e for e in run(plan(str(folder), name="x")) if isinstance(e, ScanStarted | MatrixScored)]
    assert isinstance(first, ScanStarted)
    assert first.done == 0
    assert first.dropped >= min(done, len(first.plan.matrices))
    assert len(scored) == len(first.plan.matrices)


@pytest.mark.usefixtures("working_folder")
def test_scan_reuses_scores_when_a_config_is_only_formatted(save: Save) -> None:
    folder = save(llama_tensors(2), config={"a": 1, "b": 2})
    scan(str(folder), name="x")
    (folder / "config.json").write_text('{"b": 2,\n  "a": 1}')
    events: list[object] = []
    scan(str(folder), name="x", on_event=events.append)
    assert not [e for e in events if isinstance(e, MatrixScored)]


LOST_PAGE = """
import ctypes, mmap, os, sys, threading, time
import torch
from spectrum_stream.__main__ import _end_when_pages_are_lost
_end_when_pages_are_lost()
path, case = sys.argv[1:]
file = open(path, "w+b")
file.truncate(1 << 24)
mapped = mmap.mmap(file.fileno(), 1 << 24)
tensor = torch.frombuffer(mapped, dtype=torch.float32)
os.truncate(path, 10)
def touch():
    time.sleep(0.2)
    tensor.sum()
if case == "this thread, with the GIL":
    bytes(mapped[-100:])
elif case == "this thread, without the GIL":
    tensor.sum()
else:
    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    if case == "another thread, while this one runs Python":
        while True: pass
    elif case == "another thread, while this one is in C and keeps the GIL":
        ctypes.PyDLL(None).usleep(900_000)
    thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="Windows has no SIGBUS")
@pytest.mark.parametrize(
    "case",
    [
        "this thread, with the GIL",
        "this thread, without the GIL",
        "another thread, while this one waits for it",
        "another thread, while this one runs Python",
        "another thread, while this one is in C and keeps the GIL",
    ],
)
def test_lost_page_ends_the_process_with_one_sentence(tmp_path: Path, case: str) -> None:
    command = [sys.executable, "-c", LOST_PAGE, str(tmp_path / "cut"), case]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "(changed)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_scan_detects_a_file_of_equal_size_and_time(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(1))
    path = folder / "model.safetensors"
    status = path.stat()
    scan(str(folder), name="x")
    tensors = llama_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"] *= torch.arange(32)
    save_file(tensors, folder / "other")
    (folder / "other").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    events: list[object] = []
    scan(str(folder), name="x", on_event=events.append)
    assert getattr(events[0], "dropped") > 0  # noqa: B009


HOLD = """
import sys
from pathlib import Path
from spectrum_stream.results.journal import Journal
from tests.support.records import IDENTITY
with Journal(Path(sys.argv[1]), IDENTITY):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_journal_locked_names_the_process(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    # Pipes, because the events of multiprocessing need a writable /dev/shm.
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ResultError) as error:
            Journal(path, IDENTITY)
        assert error.value.reason == "locked"
        assert f"process {process.pid} on " in str(error.value)
        process.communicate()
    assert process.returncode == 0
    with Journal(path, IDENTITY) as journal:
        assert journal.records() == {}
    # The holder file is removed, and a leftover one has no effect.
    assert [p.name for p in tmp_path.iterdir()] == ["r.sqlite"]
    (tmp_path / ".r.holder").write_text("1 elsewhere")
    with Journal(path, IDENTITY):
        pass


@pytest.mark.slow
def test_scan_twice_at_once_loses_nothing(save: Save, working_folder: Path) -> None:
    folder = save({f"layers.{i}.up.weight": torch.randn(300, 400) for i in range(40)})
    command = [sys.executable, "-m", "spectrum_stream", "scan", str(folder), "--name", "x"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert 0 in (process.returncode for process in both), errors
    # The other one found the record locked, unless the first had ended by then.
    for process, error in zip(both, errors, strict=True):
        assert process.returncode == 0 or "(locked)" in error
    assert len(json.loads(Path("model_snr_results/snr_results_x.json").read_text())) == 40
    again = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    assert "already scanned" in again.stderr


@pytest.mark.slow
def test_scan_two_models_of_one_slug_at_once_are_not_mixed(save: Save, working_folder: Path) -> None:
    folders = [save(llama_tensors(layers), folder=f"m{layers}") for layers in (2, 3)]
    commands = [[sys.executable, "-m", "spectrum_stream", "scan", str(f), "--name", "a/b"] for f in folders]
    both = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    first = both[0].returncode == 0
    # This scan met the other one, or its files.
    assert re.search(r"\((other_model|locked)\)", errors[1 if first else 0])
    published = json.loads(Path("model_snr_results/snr_results_a-b.json").read_text())
    assert len(published) == len(scan(str(folders[0 if first else 1]), name="own").modules)


def test_scan_of_a_missing_path_raises_a_source_error(working_folder: Path) -> None:
    with pytest.raises(SpectrumStreamError):
        scan("nowhere/at/all")
